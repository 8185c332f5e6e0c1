"""Where rows come from, and how the pictures that lie in files are read."""

from pipeline.sources.pictures import read_pictures
from pipeline.sources.rows import Rows

__all__ = ["Rows", "read_pictures"]
