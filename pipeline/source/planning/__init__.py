"""What planning (pipeline.source.plan) is made of: sorting rows by key, and the keys of earlier batches

external_sort   rows in any order → rows sorted by key
known_keys      keys → those that earlier batches have
"""
