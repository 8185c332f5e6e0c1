"""The captioned world: drawn scenes with known truth, served as a careless web site.

scene → draw, text → rows, site          what is there; its pixels and words; the rows and the web site
oracle                                   an image → what is in it, to score images against the truth
"""
