"""Staged samples → scores, measured once so that thresholds can change later.

scorer: the interface of a scorer, and the id that pins it
caption, language, image: measures that need no image model, on CPU workers
clip_model → clip_score, heads: scores from CLIP embeddings, on model workers
registry: the recipe's `score` section → scorers
store: score files, joined to the staged tables
job: the unit map over staged units
"""
