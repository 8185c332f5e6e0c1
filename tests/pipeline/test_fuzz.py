"""Readers of what strangers write, with inputs derived from real ones: only typed reasons, and no second of CPU time.

`make fuzz` runs the same targets for minutes each.
"""

from __future__ import annotations

import time

import fuzz_targets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MOST_CPU_S = 10.0  # of one input: against hangs only; `make fuzz` holds it to one second


def changed(target: object) -> st.SearchStrategy[bytes]:
    """Real inputs with up to six edits: bytes replaced, cut out, repeated, or a word of the format put in."""
    seeds, words = target.seeds(), target.WORDS  # type: ignore[attr-defined]
    piece = st.one_of(st.binary(max_size=8), st.sampled_from(words))
    edit = st.tuples(st.floats(0, 1), st.integers(0, 40), piece, st.booleans())

    def apply(seed: bytes, edits: list[tuple[float, int, bytes, bool]]) -> bytes:
        for where, length, new, again in edits:
            at = int(where * len(seed))
            seed = seed[:at] + (seed[at : at + length] * 2 if again else new) + seed[at + length :]
        return seed

    return st.builds(apply, st.sampled_from(seeds), st.lists(edit, max_size=6))


@pytest.mark.parametrize("name", fuzz_targets.TARGETS)
def test_only_typed_reasons_come_out(name: str) -> None:
    target = fuzz_targets.load(name)
    for seed in target.seeds():
        target.check(seed)

    @given(changed(target))
    @settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def check(data: bytes) -> None:
        start = time.process_time()
        target.check(data)
        assert time.process_time() - start < MOST_CPU_S

    check()
