"""Decisions → shards, ledger, indexes and manifest; and what rewrites or checks them.

carryover → job: packing
scrub → takedown: removing rows
verify: checking
"""
