"""How good drawn images are: what was asked for, and judges of what came out.

subjects.py     prompts with their true images: unseen scenes of the captioned world, or held-out samples
judge.py        what a judge is, and the judges that a recipe names
follows.py      the captioned world's oracle: is in the image what its prompt says?
clip.py         CLIP score: the cosine of image and prompt
fid.py          Fréchet inception distance of drawn and true images
"""
