"""Readers of what strangers write, each as a target for a fuzzer.

A target is a file of this folder. It has

    SUFFIXES      of files that may be its seeds
    WORDS         tokens of its format, which a fuzzer inserts
    LONGEST       bytes of an input
    seeds()       real inputs, made on the spot
    check(data)   read one input; whatever it raises is a finding

`make fuzz` runs them for minutes (benchmarks/fuzz.py), tests/pipeline/test_fuzz.py for a moment.
"""

from __future__ import annotations

import importlib
from typing import Any

TARGETS = ("tar", "jpeg", "png", "webp", "url", "robots", "recipe")


def load(name: str) -> Any:
    """Return the module of a target."""
    return importlib.import_module(f"fuzz_targets.{name}")
