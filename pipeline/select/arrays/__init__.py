"""Values of many rows: kept on disk, and sorted, grouped and compared in parts

large_arrays → partitions, hash_blocks: rows in files, and in parts that fit in memory
apart, equal_rows: rows that were found to differ, and the first of equal ones
"""
