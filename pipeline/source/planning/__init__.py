"""What planning (pipeline.source.plan) is made of: sorting rows by key, and the keys of earlier batches

external_sort   rows in any order → rows sorted by key, in one process
runs            the same rows in slices, on a storage that all workers see
jobs            runs → units, on workers
unit_tables     rows sorted by key → tables of units
known_keys      keys → those that earlier batches have
batches         the files of batches, and what is known of them
"""
