"""Colours of video frames: which matrix they were made with, and HDR → SDR

Numbers are those of ITU-T H.273, as FFmpeg uses them.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np

_PQ: Final = 16  # SMPTE ST 2084
_HLG: Final = 18  # ARIB STD-B67
_BT709, _UNSPECIFIED, _BT470, _BT601, _SMPTE240, _BT2020 = 1, 2, 5, 6, 7, (9, 10)
_ITU709, _ITU601, _SMPTE = 1, 5, 7  # what swscale calls them
_BT2020_NCL: Final = 9
_BRIGHTEST: Final = 10.0  # times diffuse white; becomes white, and diffuse white half its light
_SDR_WHITE: Final = 203.0  # cd/m², of diffuse white in HDR (ITU-R BT.2408)
# Linear BT.2020 → linear BT.709 (ITU-R BT.2087, section 4).
_PRIMARIES: Final = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)


def source_matrix(colorspace: int, height: int) -> int:
    """Return swscale's number of the matrix of a frame; where it is not stated, as players guess it from the height."""
    if colorspace in _BT2020:
        return _BT2020_NCL
    if colorspace == _BT709:
        return _ITU709
    if colorspace == _SMPTE240:
        return _SMPTE
    if colorspace in (_BT470, _BT601):
        return _ITU601
    return _ITU709 if height >= 720 else _ITU601


def is_hdr(transfer: int) -> bool:
    """Return whether a frame's transfer function is PQ or HLG."""
    return transfer in (_PQ, _HLG)


def to_sdr(pixels: np.ndarray, transfer: int) -> np.ndarray:
    """Map HDR pixels in BT.2020 (uint16 [H, W, 3]) to sRGB (uint8): what is brighter than white is compressed."""
    light = _curve(transfer)[pixels] @ _PRIMARIES.T  # 1 is diffuse white
    light = np.maximum(light, 0)
    peak = light.max(axis=2, keepdims=True)
    # Reinhard's curve: monotonic, and hue stays since all channels share a factor.
    mapped = peak * (1 + peak / _BRIGHTEST**2) / (1 + peak)
    light = light * np.where(peak > 0, mapped / np.maximum(peak, 1e-6), 0)
    light = np.clip(light, 0, 1)
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(encoded * 255).astype(np.uint8)


@cache
def _curve(transfer: int) -> np.ndarray:
    """Return a table: 16-bit code → light, where 1 is diffuse white."""
    code = np.arange(65536, dtype=np.float64) / 65535
    if transfer == _PQ:  # ST 2084, equation 4.1
        m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
        power = code ** (1 / m2)
        light = 10_000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1) / _SDR_WHITE
    else:  # BT.2100, HLG's inverse OETF; 0.75 is diffuse white
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
        light = scene / ((np.exp((0.75 - c) / a) + b) / 12)
    return light.astype(np.float32)
