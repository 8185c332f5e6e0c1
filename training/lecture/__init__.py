"""Several systems on one dataset, for equal time → one page where all draw the same prompts

Order: config → systems → clock → measure → results → page → run.
"""
