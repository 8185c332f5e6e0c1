"""Measured rows → decisions: kept, rejected or duplicate, each with a reason.

column_blocks → conditions → evaluate, sampling: the recipe's SQL conditions, caps and balance
hash_pairs → near_duplicates, semantic → dedup: exact, near and semantic duplicates
kept_runs → meeting: rows of new batches, and the kept rows of earlier ones
arrays: values of more rows than fit in memory
decide: all steps in the recipe's order, and the funnel
"""
