"""Dataset → report.html, and contact sheets of its rows"""
