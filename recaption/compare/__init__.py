"""Two caption layers → what differs.

clip, metrics: scores per caption
contact_sheet, compare: the page and its numbers
"""
