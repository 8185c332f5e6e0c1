"""An ONNX network of images: checked before anything is fetched, run in one thread.

A file is read as data: one that keeps its tensors in other files is refused, since its SHA-256 would not pin them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from capstan.pipeline.errors import MissingExtra, RecipeError
from capstan.pipeline.score.scorer import sha256_of_file

Floats = npt.NDArray[np.float32]

# Field numbers of onnx.proto.
_GRAPH, _INITIALIZER, _OUTPUT, _NAME, _DATA_LOCATION, _EXTERNAL = 7, 5, 12, 1, 14, 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class OnnxModel:
    """A network of one float32 input of one image. `output` names an inner tensor to return, not the first output.

    The session is loaded on first use, and not sent to workers. Raises RecipeError(field) for a file that does not fit,
    MissingExtra without onnxruntime.
    """

    def __init__(self, file: Path, field: str, extra: str, output: str | None = None) -> None:
        self.file, self.field, self._extra, self._output = file, field, extra, output

    @property
    def session(self) -> Any:
        """The onnxruntime session, loaded once per process."""
        return _session(self.file, sha256_of_file(self.file, self.field), self.field, self._extra, self._output)

    def layout(self) -> tuple[bool, int | None, int | None]:
        """Return whether channels come first, and the fixed height and width, None if any will do."""
        inputs = self.session.get_inputs()
        shape = list(inputs[0].shape) if inputs else []
        fits = len(inputs) == 1 and inputs[0].type == "tensor(float)" and len(shape) == 4
        if not fits or 3 not in (shape[1], shape[3]) or (shape[0] not in (1, None) and isinstance(shape[0], int)):
            seen = ", ".join(f"{i.type} {'×'.join(map(str, i.shape))}" for i in inputs) or "nothing"
            problem = f"{self.file} takes {seen}, not one float32 image, 1×3×H×W or 1×H×W×3"
            raise RecipeError(self.field, problem, "export the network with that one input")
        first = shape[1] == 3
        height, width = (side if isinstance(side, int) else None for side in (shape[2:] if first else shape[1:3]))
        return first, height, width

    def run(self, image: Floats) -> Floats:
        """Return the output for one input [1, ...], flattened. Raises ValueError if the network rejects the input."""
        session = self.session
        output = self._output or session.get_outputs()[0].name
        try:
            found = session.run([output], {session.get_inputs()[0].name: image})[0]
        except Exception as error:  # noqa: BLE001 - onnxruntime raises different errors, none of them documented
            raise ValueError(_first_line(error)) from None
        if not isinstance(found, np.ndarray) or found.dtype.kind != "f":
            raise ValueError(f"the output {output} is not a tensor of floats")
        return np.asarray(found.reshape(-1), np.float32)


@functools.lru_cache(maxsize=4)
def _session(file: Path, sha256: str, field: str, extra: str, output: str | None) -> Any:
    del sha256  # part of the cache's key: a file that changed is loaded again
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise MissingExtra(field, "onnxruntime", extra) from None
    data = file.read_bytes()
    try:
        external = any(_is_external(tensor) for tensor in _tensors(data))
    except (IndexError, ValueError):
        external = False  # onnxruntime says what is wrong with it
    if external:
        problem = f"{file} keeps its tensors in other files"
        raise RecipeError(field, problem, "export the network to one file (torch.onnx.export: external_data=False)")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # sums do not depend on the number of cores
    options.log_severity_level = 4
    try:
        # Messages that follow each other are merged when read: this adds an output to the graph.
        more = b"" if output is None else _message(_GRAPH, _message(_OUTPUT, _message(_NAME, output.encode())))
        return onnxruntime.InferenceSession(data + more, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - onnxruntime raises different errors, none of them documented
        hint = "use an .onnx file that onnxruntime on the CPU can run"
        raise RecipeError(field, f"cannot load {file} ({_first_line(error)})", hint) from None


def _first_line(error: Exception) -> str:
    """Return the first line of an error, at most 200 characters."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


# Protocol buffers ----------------------------------------------------------------------------------------------------


def _tensors(model: bytes) -> Iterator[memoryview]:
    """Yield the graph's weights, each a TensorProto."""
    for graph in _values(memoryview(model), _GRAPH):
        yield from _values(graph, _INITIALIZER)


def _is_external(tensor: memoryview) -> bool:
    return any(number == _DATA_LOCATION and value == _EXTERNAL for number, value in _fields(tensor))


def _values(message: memoryview, wanted: int) -> Iterator[memoryview]:
    return (value for number, value in _fields(message) if number == wanted and isinstance(value, memoryview))


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield field number and value of each field. Raises ValueError or IndexError for anything else than a message."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(message, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(message):
            raise ValueError("a field is cut off")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the number at a position, and the position after it."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _message(number: int, content: bytes) -> bytes:
    """Return a field of bytes; `content` may have at most 127 of them."""
    assert len(content) < 0x80
    return bytes([number << 3 | _BYTES, len(content)]) + content
