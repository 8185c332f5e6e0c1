"""Where rows come from, and how the pictures that lie in files are read."""

from capstan.pipeline.source.image_reader import read_pictures
from capstan.pipeline.source.reader import SourceReader

__all__ = ["SourceReader", "read_pictures"]
