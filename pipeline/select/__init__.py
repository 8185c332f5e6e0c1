"""Measured rows → decisions: kept, rejected or duplicate, each with a reason.

column_blocks → conditions, sampling: the recipe's SQL conditions, caps and balance
hash_blocks → near_duplicates, semantic → dedup: exact, near and semantic duplicates
large_arrays: values per row that are kept on disk
decide: all steps in the recipe's order, and the funnel
"""
