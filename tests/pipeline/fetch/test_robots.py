"""robots.txt as RFC 9309 reads it. That it is asked for and obeyed: test_fetch.py."""

from __future__ import annotations

import re
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.pipeline.fetch import robots


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/", True), ("/fish", False), ("/fish.html", False), ("/Fish", True), ("/x/fish", True), ("/a.gif", False),
        ("/a.gif?x", True), ("/deep/in/secret/x", False), ("/caf%C3%A9/x", False), ("/caf%c3%a9", False),
        ("/tilde/%7Ejoe/", False), ("/query?id=5&x", False), ("/query?x&id=5", True), ("/open/secret", True),
    ],
)  # fmt: skip
def test_rules_of_robots_txt(path: str, allowed: bool) -> None:
    rules = robots.parse(
        "Disallow: /nobody\nUser-Agent: other\nUser-agent: CAPSTAN/2.0 # us\nDisallow: /fish\nDisallow: /*.gif$\n"
        "nonsense\n"
        "Crawl-delay: 3\nDisallow: */secret\nDisallow: /café\nDisallow: /tilde/~joe\nDisallow: /query?id=\n"
        "Allow: /open/secret\nDisallow:\n\nUser-agent: *\nDisallow: /\n",
        "capstan",
    )
    assert rules.allows(path) == allowed


def test_groups_of_robots_txt() -> None:
    text = (
        "User-agent: a\nUser-agent: b\nDisallow: /ab\n\nUser-agent: *\nDisallow: /all\nUser-agent: a\nDisallow: /more\n"
    )
    assert not robots.parse(text, "a").allows("/ab")
    assert not robots.parse(text, "a").allows("/more")  # groups for one robot are joined
    assert robots.parse(text, "a").allows("/all")
    assert not robots.parse(text, "b").allows("/ab")
    assert not robots.parse(text, "c").allows("/all")
    assert robots.parse("", "c").allows("/all")
    assert robots.parse("<html>not found</html>", "c").allows("/all")


@given(pattern=st.text("ab*$", max_size=12), path=st.text("ab", max_size=10))
@settings(max_examples=300, deadline=None)
def test_patterns_match_as_the_standard_says(pattern: str, path: str) -> None:
    anchored = pattern.endswith("$")
    form = ".*".join(re.escape(piece) for piece in pattern.removesuffix("$").split("*")) + ("\\Z" if anchored else "")
    assert robots._matches(pattern, path) == bool(re.match(form, path))


@given(
    rules=st.lists(st.tuples(st.booleans(), st.text("ab*$", min_size=1, max_size=5)), max_size=6),
    path=st.text("ab", max_size=8),
)
@settings(max_examples=300, deadline=None)
def test_the_longest_match_decides_and_allow_at_a_tie(rules: list[tuple[bool, str]], path: str) -> None:
    matches = [(len(pattern), allow) for allow, pattern in rules if robots._matches(pattern, path)]
    assert robots.Rules.of(rules).allows(path) == max(matches, default=(0, True))[1]


def peak_bytes(text: str) -> tuple[int, int]:
    """What the rules of a robots.txt hold, and what parsing it takes, in bytes."""
    tracemalloc.start()
    try:
        rules = robots.parse(text, "capstan")
        assert not rules.allows("/1")
        return tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


def test_rules_are_held_in_about_the_bytes_of_their_text() -> None:
    for form in ("Disallow: /{:x}\n", "Disallow: /*{:x}\n"):
        text = "User-agent: *\n" + "".join(form.format(number) for number in range(10_000))
        assert peak_bytes(text)[0] < 1.5 * len(text)


def test_groups_for_thousands_of_robots_take_no_memory() -> None:
    agents = "".join(f"User-agent: bot{chr(97 + number % 26)}{number}\n" for number in range(2_000))
    rules = "".join(f"Disallow: /{number}\n" for number in range(1_000))
    assert peak_bytes(f"{agents}User-agent: *\n{rules}")[1] < 2_000_000  # of two million pairs


def test_a_pattern_of_many_stars_takes_no_time() -> None:
    started = time.monotonic()
    robots.Rules.of([(False, "*a" * 2000 + "b")]).allows("/" + "a" * 8000)
    assert time.monotonic() - started < 5
