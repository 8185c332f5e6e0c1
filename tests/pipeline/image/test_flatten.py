"""Decoding takes little more memory than the decoded frame and the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from repo import ROOT

SIDE = 1500
# What the process holds at most while it decodes, beyond what it held before, in bytes per pixel.
SCRIPT = """
import io, json, sys
from PIL import Image
from capstan.pipeline import config
from capstan.pipeline.image import flatten
from capstan.pipeline.image.decode import StoredImage, decode

def held():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

flatten._STRIP_PIXELS, side, peaks = 1 << 16, int(sys.argv[1]), {}
for kind, options in {"PNG": {"compress_level": 1}, "WEBP": {"quality": 20, "method": 0}}.items():
    def file_of(side):
        file = io.BytesIO()
        Image.new("RGBA", (side, side), (200, 30, 90, 120)).save(file, kind, **options)
        return file.getvalue()
    data = file_of(side)
    decode(file_of(100), config.Image(size=64))  # so that nothing is loaded while memory is measured
    open("/proc/self/clear_refs", "w").write("5")
    before = held()
    assert isinstance(decode(data, config.Image(size=64)), StoredImage)
    peaks[kind] = (held() - before) / side**2
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read as Linux has them")
def test_transparent_images_take_no_copies_of_themselves() -> None:
    """Four bytes per pixel decoded (libwebp: twice, for a moment) and three of the result; not 17 and 25."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(SIDE)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    assert peaks["PNG"] < 9
    assert peaks["WEBP"] < 10
