"""Rows of (url, caption) in, curated WebDataset shards and a complete ledger out; and what all floors share."""
