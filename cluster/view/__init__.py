"""A dataset → a local web application that shows it: `capstan view`.

images, captions: what the page shows of a row
access → server: who may ask, and the routes; static/ holds the page
"""
