"""Decisions → shards, ledger, indexes and manifest; takedown and verification

carryover → job: pack shards
scrub → takedown: remove rows
verify: check a dataset
"""
