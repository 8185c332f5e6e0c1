"""Where rows come from, and how the images that lie in files are read."""

from capstan.pipeline.source.image_reader import read_images
from capstan.pipeline.source.reader import SourceReader

__all__ = ["SourceReader", "read_images"]
