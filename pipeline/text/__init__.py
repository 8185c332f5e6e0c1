"""Text from outside → plain data, and text that is safe to print

safe_yaml: YAML → data, bounded in size, depth and time
printable: any text → text without control characters
regular_file: a path → the same path, if opening it does not wait
"""
