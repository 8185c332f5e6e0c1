"""Lists of what must not be in a dataset: entries, their equivalents, and what is left of a row."""

from pathlib import Path

import pyarrow as pa
import pytest

from capstan.pipeline import config
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.source.blocklist import (
    Blocklist,
    add_removed,
    domain_digest,
    is_removed,
    read_lists,
    read_removed,
    url_digest,
)
from capstan.pipeline.source.columns import Row, of_rows
from capstan.pipeline.storage import Storage


@pytest.mark.parametrize(
    "same",
    [
        "https://example.org/a?b",
        "http://EXAMPLE.org:80/a?b#part",
        "http://me@example.org/a?b",
        " http://example.org/a?b",
    ],
)
def test_equivalent_urls_have_one_digest(same: str) -> None:
    assert url_digest(same) == url_digest("http://example.org/a?b")


@pytest.mark.parametrize("other", ["http://example.org/A?b", "http://example.org:8080/a?b", "http://example.com/a?b"])
def test_other_urls_have_other_digests(other: str) -> None:
    assert url_digest(other) != url_digest("http://example.org/a?b")


def test_a_domain_includes_its_subdomains() -> None:
    blocked = Blocklist(domains=frozenset([domain_digest("Bücher.example")]))
    urls = [
        "http://xn--bcher-kva.example/a",
        "https://img.bücher.example:81/b",
        "http://example/c",
        "http://notbücher.example/d",
    ]
    assert blocked.hits(urls, urls, [""] * 4) == [True, True, False, False]


def read(folder: Path, **lists: str) -> Blocklist:
    paths = {}
    for kind, text in lists.items():
        paths[kind] = str(folder / f"{kind}.txt")
        (folder / f"{kind}.txt").write_text(text, "utf-8-sig")
    return read_lists(config.Blocklist(**paths), lambda kind: f"blocklist.{kind}")


def test_lists_are_read_line_by_line(tmp_path: Path) -> None:
    lists = read(
        tmp_path, keys=f"# a comment\n\n  {'A' * 32}\n", sha256="0" * 64, domains="*.example.org\nhttp://b.c/d"
    )
    assert lists.keys == {"a" * 32}
    assert lists.sha256 == {"0" * 64}
    assert lists.domains == {domain_digest("example.org"), domain_digest("b.c")}


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("keys", "abc", "'abc' is not a key of 32 hexadecimal digits"),
        ("sha256", "0" * 63, "is not a SHA-256 sum of 64 hexadecimal digits"),
        ("domains", "no domain", "'no domain' is not a domain"),
    ],
)
def test_a_line_that_is_not_an_entry_is_named(tmp_path: Path, kind: str, line: str, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"blocklist\.{kind}: .*{kind}\.txt, line 2: .*{message}"):
        read(tmp_path, **{kind: f"# first\n{line}\n"})


def test_only_the_key_is_left_of_a_blocked_row() -> None:
    rows = of_rows([Row("http://a.org/1", "one", extra='{"n":1}'), Row("http://b.org/2", "two", image=b"bytes")])
    left = Blocklist(domains=frozenset([domain_digest("a.org")])).without(rows).to_pylist()
    assert [is_removed(row) for row in left] == [True, False]
    assert left[0]["key"] == rows["key"][0].as_py()
    assert (left[0]["url"], left[0]["caption"], left[0]["extra"], left[0]["image"]) == ("", "", "{}", None)
    assert left[1] == rows.to_pylist()[1]


def test_the_datasets_own_list_grows(storage: Storage) -> None:
    assert not read_removed(storage)
    first, second = Blocklist(keys=frozenset(["a" * 32])), Blocklist(urls=frozenset([url_digest("http://a.org/")]))
    add_removed(storage, first)
    add_removed(storage, second)
    assert read_removed(storage) == first | second
    assert len([name for name in storage.names("removed") if name.endswith(".parquet")]) == 1
    assert b"a.org" not in b"".join(storage.read(name) for name in storage.names("removed"))


def test_blocked_rows_by_key_and_sum() -> None:
    blocked = Blocklist(keys=frozenset(["k1"]), sha256=frozenset(["s2"]))
    assert blocked.hits(["k1", "k2", "k3"], pa.array([""] * 3).to_pylist(), ["", "s2", ""]) == [True, True, False]
