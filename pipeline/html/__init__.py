"""Values → HTML and SVG building blocks, without script.

css, page: the style and the blocks of a page
plots, interval_plots: numbers → SVG
"""
