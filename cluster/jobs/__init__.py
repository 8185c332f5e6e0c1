"""`capstan submit` and `capstan jobs`: a command and a target → a job there.

clusters_file: clusters.yaml → targets
store, submit, cli: records of jobs, submission, the commands
"""
