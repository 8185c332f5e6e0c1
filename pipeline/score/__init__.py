"""Scorers: what is measured of staged samples once, so that it can be decided upon many times.

scorer.py      what a scorer is, and how it is pinned
caption.py  language.py  image.py      measures that need no image model, on CPU workers
tower.py → clip.py, heads.py           what is read off a CLIP's embeddings, on model workers
registry.py    the recipe's section → scorers
store.py       their files, joined to the staged tables
job.py         the unit map over staged units
"""
