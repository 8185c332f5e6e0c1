"""robots.txt as RFC 9309 reads it. That it is asked for and obeyed: test_fetch.py."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import robots


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


def test_a_pattern_of_many_stars_takes_no_time() -> None:
    started = time.monotonic()
    robots.Rules(((False, "*a" * 2000 + "b"),)).allows("/" + "a" * 8000)
    assert time.monotonic() - started < 5
