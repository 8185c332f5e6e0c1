"""A command and a target → a job there: `capstan submit` and `capstan jobs`

clusters_file: clusters.yaml → targets
store, submit, cli: job records, submission, the commands
"""
