"""Recipe source → rows and units; image files → bytes"""

from capstan.pipeline.source.image_reader import read_images
from capstan.pipeline.source.reader import SourceReader

__all__ = ["SourceReader", "read_images"]
