"""Source videos and sounds → a WebDataset of clips, and a ledger with one row per source file

cuts → clip → job → cut (the command)
"""
