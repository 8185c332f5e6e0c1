"""Planned units → staged images, and one row of measurements per source row.

retry_rows: selects the rows that `build --retry` fetches again
job: the unit map over planned units
staging: finds staged images, wherever they are now
"""
