"""Fixtures of this floor."""

import pytest

from capstan.pipeline.config import Resources


@pytest.fixture(scope="session")
def two_cpus() -> Resources:
    """Resources of a small run, whatever machine tests run on."""
    return Resources(cpus=2)
