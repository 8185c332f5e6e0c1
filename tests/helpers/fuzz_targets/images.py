"""What the targets of the three image formats share: the whole way of a file from the web into a shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from capstan.pipeline import config
from capstan.pipeline.image import jpeg, sniff
from capstan.pipeline.image.copied import copy_or_decode
from capstan.pipeline.image.decode import Failure, StoredImage, decode
from capstan.pipeline.image.opt_out import opt_out
from capstan.pipeline.image.sniff import Unreadable
from capstan.pipeline.records import is_reason

_SMALL = config.Image(min_size=1, size=64, max_pixels=1_000_000)
_AS_IT_IS = config.Image(min_size=1, resize="none", check="header", max_pixels=1_000_000)
_METADATA = {*range(0xE1, 0xEE), 0xEF, 0xFE}  # markers: APP1 to APP15 but Adobe's, and comments


@contextmanager
def typed() -> Iterator[None]:
    """Allow Unreadable with a reason that the ledger knows, and nothing else."""
    try:
        yield
    except Unreadable as why:
        if not is_reason(why.reason):
            raise ValueError(why.reason) from None


def check_image(data: bytes, kind: str, walk: Callable[[bytes], None]) -> None:
    """Walk the structure of a file of this kind, then decode whatever it is in two ways."""
    with typed():
        found = sniff.sniff(data)
        sniff.check_whole(found, data)
        opt_out(found, data)
        if found == kind:
            walk(data)
    for settings, how in ((_SMALL, decode), (_AS_IT_IS, copy_or_decode)):
        _check_stored(how(data, settings, noai=True))


def _check_stored(result: StoredImage | Failure) -> None:
    """Check that an image is as its row will say, and holds no metadata."""
    if isinstance(result, Failure):
        assert is_reason(result.reason), result
        return
    header = jpeg.read_header(result.jpeg)
    assert (header.width, header.height) == (result.width, result.height), result
    found = {segment.marker for segment in jpeg.segments(result.jpeg)}
    assert not found & _METADATA, found


def without_ends(files: list[bytes]) -> list[bytes]:
    """Return the files, and each one cut in its middle."""
    return [*files, *(data[: len(data) // 2] for data in files)]
