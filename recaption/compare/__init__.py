"""Two caption layers → a comparison

clip, metrics: scores per caption
contact_sheet, compare: the page and its numbers
"""
