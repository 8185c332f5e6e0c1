"""Marks of tests that need a GPU: `make gpu` runs them, and elsewhere they are skipped with the reason."""

from __future__ import annotations

import pytest
import torch

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU"),
]
