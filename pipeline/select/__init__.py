"""Measured rows → decisions: kept, rejected or duplicate, each with a reason.

conditions, sampling: the recipe's SQL conditions, caps and balance
near_duplicates, semantic → dedup: exact, near and semantic duplicates
decide: all steps in the recipe's order, and the funnel
"""
