"""Rows of (url, caption) → WebDataset shards and a ledger; code shared by all floors"""
