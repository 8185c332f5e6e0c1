"""A dataset → report.html, and contact sheets of its rows."""
