"""How good drawn pictures are: what was asked for, and judges of what came out.

subjects.py     prompts with their true pictures: unseen scenes of the captioned world, or held-out samples
judge.py        what a judge is, and the judges that a recipe names
follows.py      the captioned world's oracle: is in the picture what its prompt says?
clip.py         CLIP score: the cosine of picture and prompt
fid.py          Fréchet inception distance of drawn and true pictures
"""
