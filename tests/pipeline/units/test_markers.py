"""Markers and their log: a unit is committed in one or the other, at every moment."""

import pytest

from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import MarkerLog, Unit


@pytest.fixture
def log(storage: Storage) -> MarkerLog:
    return MarkerLog(storage, "nothing")


def some(count: int, start: int = 0) -> dict[str, dict[str, int]]:
    return {f"u{number:04}": {"samples": number} for number in range(start, start + count)}


def commit(log: MarkerLog, facts: dict[str, dict[str, int]]) -> None:
    for unit, fact in facts.items():
        log.mark(unit, fact)


def test_many_markers_become_one_file(log: MarkerLog) -> None:
    commit(log, some(150))
    assert log.gather() == some(150) == log.read()
    assert log.storage.names() == ["state/nothing/log.json"]
    commit(log, some(3, 150))
    assert log.gather() == some(153)
    assert len(log.storage.names()) == 4, "a few markers are not worth a new log"
    assert log.pending([Unit("u0000"), Unit("u0151"), Unit("u0200")]) == [Unit("u0200")]


def test_a_unit_of_which_nothing_is_to_be_said_is_committed_too(log: MarkerLog) -> None:
    commit(log, {"a": {}, "b": {"samples": 1}})
    assert log.read() == {"a": {}, "b": {"samples": 1}}
    assert log.gather({"a": {}}) == log.read()
    assert log.pending([Unit("a"), Unit("c")]) == [Unit("c")]


def test_killed_while_gathering_loses_nothing(log: MarkerLog, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(log, some(150))
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            log.gather()
    log.storage.delete("state/nothing/done/u0007.json")  # as if it had been killed after the first
    assert log.read() == some(150)
    assert log.gather() == some(150)
    assert log.storage.names() == ["state/nothing/log.json"]


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_units_that_end_together_have_one_file(log: MarkerLog) -> None:
    log.mark_all(some(40))
    log.mark_all(some(3, 40))
    assert len(log.storage.names()) == 1 + 3
    assert log.read() == some(43)
    assert log.pending([Unit("u0007"), Unit("u0099")]) == [Unit("u0099")]
    assert log.gather() == some(43)
    assert log.storage.names() == ["state/nothing/log.json"]


def test_a_unit_done_again_has_its_new_facts_however_it_was_marked(log: MarkerLog) -> None:
    log.mark_all(some(9))
    log.mark("u0100", {"samples": 1})
    again = {unit: {"samples": 7} for unit in [*some(9), "u0100"]}
    log.mark_all(again | some(20, 200), again=again)
    assert log.read() == log.gather() == again | some(20, 200)


def test_a_damaged_batch_is_done_again(log: MarkerLog) -> None:
    log.mark_all(some(9))
    (name,) = log.storage.names()
    log.storage.write(name, b"{")
    assert log.read() == {}


def test_forgotten_units_are_pending_again(log: MarkerLog) -> None:
    commit(log, some(150))
    log.gather()
    commit(log, some(2, 150))
    log.forget(["u0003", "u0151", "never there"])
    left = {unit: fact for unit, fact in some(152).items() if unit not in ("u0003", "u0151")}
    assert log.read() == left
    log.mark("u0003", {"samples": 99})
    assert log.read()["u0003"] == {"samples": 99}


def test_units_of_a_batch_can_be_forgotten(log: MarkerLog) -> None:
    log.mark_all(some(9))
    log.forget(["u0003"])
    assert log.read().keys() == some(9).keys() - {"u0003"}


def test_facts_that_the_driver_knows_are_not_read_again(log: MarkerLog, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(log, some(5))
    monkeypatch.setattr(Storage, "read", lambda _, name: pytest.fail(name) if "done/" in name else b"{}")
    assert log.gather(some(5)) == some(5)


def test_quarantined_units_and_their_release(log: MarkerLog) -> None:
    log.quarantine("bad", {"n": 1}, 3, "ValueError: bad\nTraceback")
    assert log.quarantined() == {"bad": "ValueError: bad"}
    log.release("bad")
    assert log.quarantined() == {}


def test_markers_are_read_while_another_process_gathers_them(log: MarkerLog, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(log, some(150))
    listed = log.storage.names("state/nothing/done")
    log.gather()
    names, stale = Storage.names, [listed]
    monkeypatch.setattr(Storage, "names", lambda *of: stale.pop() if stale else names(*of))
    assert log.read() == some(150)
    assert not stale
    monkeypatch.setattr(Storage, "names", lambda *_: listed)
    with pytest.raises(DamagedFile, match="cannot be read"):
        log.read()
