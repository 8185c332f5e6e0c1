"""Values → HTML and SVG building blocks, without scripts

css, page: the style and the blocks of a page
axes → plots, interval_plots: numbers → SVG
"""
