"""What a GPU can show: tests, then speed and memory, one measurement per process, resumable.

Order: results (the file and the table) → data (datasets and random models at real shapes) → one file per kind of
measurement → plan (all of them, the newest risk first) → __main__ (the clock and the child processes).
"""
