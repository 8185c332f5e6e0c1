"""The captioned world: drawn scenes with known truth, served as a careless web site.

scene → render, captions, translate: a scene's content, its pixels, its words
defects → table, server: the rows (url, caption), and the web site that serves the images
oracle → prompt_score: reads an image back, to score it against a scene or a prompt
"""
