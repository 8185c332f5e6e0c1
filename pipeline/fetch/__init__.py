"""URL → bytes, or a reason.

resolver, robots: which hosts and paths may be requested
client: one URL
fetcher: many at once, with limits per host
"""
