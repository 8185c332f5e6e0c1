"""Slots of hosts are lent: never too many, to all who ask in the end, and back from workers that ended."""

from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.pipeline.fetch.host_limits import HostLimits, Wish
from capstan.pipeline.fetch.robots import ALL_ALLOWED


class Worker:
    """Holds what it was lent, and uses it as it likes."""

    def __init__(self, name: str, limits: HostLimits) -> None:
        self.name, self.limits, self.slots, self.using = name, limits, 0, 0

    def ask(self, waiting: int) -> None:
        wishes = {"a.test": Wish(self.using, waiting)}
        self.slots = self.limits.exchange(self.name, wishes, {}, [], {}).grants["a.test"].slots

    def start(self, count: int) -> int:
        started = max(0, min(count, self.slots - self.using))
        self.using += started
        return started


@settings(max_examples=30, deadline=None)
@given(data=st.data(), per_host=st.integers(1, 9), workers=st.integers(1, 12))
def test_never_more_than_the_hosts_limit_are_in_flight(data: st.DataObject, per_host: int, workers: int) -> None:
    limits = HostLimits(per_host)
    crowd = [Worker(str(number), limits) for number in range(workers)]
    for _ in range(30):
        worker = data.draw(st.sampled_from(crowd))
        worker.using -= data.draw(st.integers(0, worker.using))
        waiting = data.draw(st.integers(0, 20))
        worker.ask(waiting)
        worker.start(data.draw(st.integers(0, waiting)))
        assert sum(worker.using for worker in crowd) <= per_host
        assert sum(worker.using for worker in crowd) <= limits.lent("a.test")


def test_a_scarce_host_is_shared_and_a_free_one_is_not_split() -> None:
    limits = HostLimits(8)
    first, second = Worker("1", limits), Worker("2", limits)
    first.ask(20)
    assert first.start(20) == 8
    second.ask(20)
    assert second.slots == 0
    for _ in range(3):
        first.ask(20)
        first.using = min(first.using, first.slots)  # requests end; no new ones start
        second.ask(20)
        second.start(20)
    assert (first.using, second.using) == (4, 4)
    first.using = 0
    first.ask(0)
    second.ask(20)
    assert second.slots == 8


def test_what_a_lost_worker_held_is_lent_again() -> None:
    now = 0.0
    limits = HostLimits(2, clock=lambda: now)
    lost, other = Worker("1", limits), Worker("2", limits)
    lost.ask(2)
    other.ask(1)
    assert (lost.slots, other.slots) == (2, 0)
    now = 11.0
    other.ask(1)
    assert other.slots == 2
    other.ask(0)
    assert limits.lent("a.test") == 0


def test_a_pause_is_told_to_everybody_until_it_is_over() -> None:
    now = 0.0
    limits = HostLimits(2, clock=lambda: now)
    limits.exchange("1", {"a.test": Wish(0, 1)}, {"a.test": (30.0, "http_429")}, [], {})
    now = 10.0
    grant = limits.exchange("2", {"a.test": Wish(0, 1), "b.test": Wish(0, 1)}, {}, [], {}).grants
    assert (grant["a.test"].pause_s, grant["a.test"].reason, grant["b.test"].pause_s) == (20.0, "http_429", 0.0)
    now = 31.0
    assert limits.exchange("2", {"a.test": Wish(0, 1)}, {}, [], {}).grants["a.test"].pause_s == 0.0


def test_one_worker_reads_a_robots_txt_for_all() -> None:
    now = 0.0
    limits = HostLimits(2, clock=lambda: now)
    origin = "http://a.test"

    def ask(worker: str, **read: object) -> dict[str, object]:
        return limits.exchange(worker, {}, {}, [origin], {origin: (ALL_ALLOWED, 60.0)} if read else {}).rules

    assert ask("1") == {origin: None}
    assert ask("2") == {}
    now = 121.0  # the first has died
    assert ask("2") == {origin: None}
    ask("2", read=True)
    (rules, last_s) = ask("3")[origin]
    assert rules == ALL_ALLOWED
    assert 50 < last_s <= 60
