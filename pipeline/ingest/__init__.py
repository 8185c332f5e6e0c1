"""Planned units → staged images and what was measured of each row.

retry_rows: which rows `build --retry` fetches again
job: the unit map over planned units
staging: where staged images are now
"""
