"""ONNX files written by hand (onnx.proto): a descriptor that sees how much of each colour there is, wherever it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_colour_descriptor(
    file: Path,
    *,
    dim: int = 32,
    side: int | None = None,
    channels_last: bool = False,
    kernel: int = 1,
    external: bool = False,
    seed: int = 0,
) -> Path:
    """Write a network of images [batch, 3, side, side] → [batch, dim]: convolution, ReLU, mean over places.

    It does not change if an image is mirrored, and little if it is cropped.
    """
    random = np.random.default_rng(seed)
    weight = random.normal(0, 1, (dim, 3, kernel, kernel)).astype(np.float32)
    weight -= weight.mean((2, 3), keepdims=True) * (kernel > 1)
    offset = random.normal(0, 1, dim).astype(np.float32) * (kernel == 1)
    shape: list[int | str] = ["batch", 3, side or "height", side or "width"]
    if channels_last:
        shape = [shape[0], *shape[2:], 3]
    planes = "planes" if channels_last else "image"
    nodes = [
        _node("Transpose", ["image"], "planes", _ints("perm", [0, 3, 1, 2])) if channels_last else b"",
        _node("Conv", [planes, "weight", "offset"], "seen"),
        _node("Relu", ["seen"], "some"),
        _node("GlobalAveragePool", ["some"], "pooled"),
        _node("Flatten", ["pooled"], "descriptor"),
    ]
    graph = b"".join(_field(1, node) for node in nodes if node) + _field(2, b"descriptor")
    tensors = {"weight": weight, "offset": offset}
    graph += b"".join(_field(5, _tensor(name, values, external)) for name, values in tensors.items())
    graph += _field(11, _value("image", shape)) + _field(12, _value("descriptor", ["batch", dim]))
    file.write_bytes(_number(1, 8) + _field(7, graph) + _field(8, _number(2, 13)))
    return file


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _ints(name: str, values: list[int]) -> bytes:
    """Return an attribute of integers."""
    return _field(1, name.encode()) + b"".join(_number(8, value) for value in values) + _number(20, 7)


def _node(kind: str, inputs: list[str], output: str, attribute: bytes = b"") -> bytes:
    names = b"".join(_field(1, name.encode()) for name in inputs) + _field(2, output.encode())
    return names + _field(4, kind.encode()) + (_field(5, attribute) if attribute else b"")


def _tensor(name: str, values: np.ndarray, external: bool) -> bytes:
    """Return float32 weights; `external`: as if they were in the file weights.bin."""
    head = b"".join(_number(1, side) for side in values.shape) + _number(2, 1) + _field(8, name.encode())
    if external:
        return head + _field(13, _field(1, b"location") + _field(2, b"weights.bin")) + _number(14, 1)
    return head + _field(9, values.astype("<f4").tobytes())


def _value(name: str, shape: list[int | str]) -> bytes:
    sides = [_number(1, side) if isinstance(side, int) else _field(2, side.encode()) for side in shape]
    kind = _number(1, 1) + _field(2, b"".join(_field(1, side) for side in sides))
    return _field(1, name.encode()) + _field(2, _field(1, kind))
