"""`capstan demo` and `capstan experiment world`: all stages on drawn images

recipes, demo, report: the demo
experiment: the caption experiment on the demo's dataset
"""
