"""Text from outside → plain data, and text that is safe to print

safe_yaml: YAML → data, bounded in size, depth and time
printable: any text → text without control characters
"""
