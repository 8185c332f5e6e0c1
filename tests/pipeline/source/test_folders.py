"""Images in folders and tars, here and in a bucket: where they are, and reading them in place."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from source_files import MEMBERS, packed, recipe, rows, urls_and_captions, write_table, write_tar

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.source import SourceReader, folders, read_images, reader
from capstan.pipeline.source.image_reader import Span, TooLarge, span_of
from capstan.pipeline.storage import Storage


def images(found: list[dict[str, Any]], where: Recipe) -> list[bytes | Exception]:
    """Return the images of the rows, in their order."""
    spans = [span_of(row, number) for number, row in enumerate(found)]
    return [data for _, data in sorted(read_images(spans, where), key=lambda answer: answer[0])]


def write_folder(path: Path) -> None:
    (path / "sub").mkdir(parents=True)
    (path / "a.jpg").write_bytes(b"JPEG a")
    (path / "a.txt").write_text("a cat\n")
    (path / "sub" / "b.PNG").write_bytes(b"PNG")
    (path / "sub" / "b.json").write_text('{"caption": "a dog", "licence": "cc0"}')


def test_a_folder_of_images_with_captions_next_to_them(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder")
    found = rows(tmp_path / "folder")
    assert [row["caption"] for row in found] == ["a cat", "a dog"]
    assert found[1]["extra"] == '{"licence":"cc0"}'
    assert images(found, recipe(tmp_path)) == [b"JPEG a", b"PNG"]


def test_names_that_are_not_utf8_are_read_and_told_apart(tmp_path: Path) -> None:
    folder = tmp_path / "caf\udcff"
    folder.mkdir()
    for name in ("caf\udce9", "caf\udce8", "café"):
        (folder / f"{name}.jpg").write_bytes(os.fsencode(name))
        (folder / f"{name}.txt").write_bytes(ascii(name).encode())
    for place in (folder, folder / "c*.???", folder.parent / "*" / "**"):
        found = rows(place)
        assert len({row["key"] for row in found}) == 3
        assert sorted(images(found, recipe(tmp_path)), key=repr) == [b"caf\xc3\xa9", b"caf\xe8", b"caf\xe9"]
        assert {row["caption"] for row in found} == {"'caf\\udce9'", "'caf\\udce8'", "'caf\\xe9'"}
        assert all(row["url"] == row["file"] and row["file"].startswith("file:///") for row in found)
    write_tar(folder / "t.tar", MEMBERS)
    write_table(folder / "t.csv")
    found = rows(folder / "t.tar")
    assert images(found, recipe(tmp_path)) == [b"JPEG one", b"WEBP"]
    assert len(rows(folder / "t.csv")) == 3


def test_captions_may_have_suffixes_in_capitals(tmp_path: Path) -> None:
    for name, text in {"a.JPG": "", "a.TXT": "a cat", "b.jpg": "", "b.Json": '{"caption": "a dog"}'}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "c.jpg").touch()
    (tmp_path / "c.TXT").write_text("not this one")
    (tmp_path / "c.txt").write_text("a bird")
    assert [row["caption"] for row in rows(tmp_path)] == ["a cat", "a dog", "a bird"]


@pytest.mark.parametrize("place", ["folder", "t.tar"])
def test_large_texts_next_to_images_are_held_a_few_at_a_time(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_BATCH_BYTES", 10_000)
    monkeypatch.setattr(reader, "_BATCH_BYTES", 10_000)
    (tmp_path / "folder").mkdir()
    members = [(f"{n}.{suffix}", b"x" * 4000) for n in range(10) for suffix in ("jpg", "txt")]
    for name, data in members:
        (tmp_path / "folder" / name).write_bytes(data)
    write_tar(tmp_path / "t.tar", members)
    requested: list[int] = []

    def counted(spans: list[Span], *rest: Any) -> Iterator[tuple[int, bytes | Exception]]:
        requested.append(sum(span.length for span in spans))
        return read_images(spans, *rest)

    monkeypatch.setattr(reader, "read_images", counted)
    found = list(SourceReader(recipe(tmp_path / place)).tables())
    assert sum(requested) == (40_000 if place == "folder" else 0)
    assert max([0, *requested]) <= 10_000
    assert [len(table) for table in found] == [3, 3, 3, 1]


def test_webdataset_tars_are_read_in_place(tmp_path: Path) -> None:
    write_tar(tmp_path / "t.tar", MEMBERS)
    found = rows(tmp_path / "t.tar")
    assert [row["caption"] for row in found] == ["a cat", "a dog"]
    assert found[1]["extra"] == '{"n":1}'
    assert images(found, recipe(tmp_path)) == [b"JPEG one", b"WEBP"]


def test_samples_of_a_tar_share_their_name_up_to_its_first_dot(tmp_path: Path) -> None:
    members = [
        ("0.jpg", b"JPEG 0"),
        ("0.meta.json", b"{}"),
        ("0.txt", b"zero"),
        ("a.b/1.jpg", b"JPEG 1"),
        ("a.b/1.seg.png", b"mask"),
        ("a.b/1.txt", b"one"),
    ]
    write_tar(tmp_path / "t.tar", members)
    found = rows(tmp_path / "t.tar")
    assert [row["caption"] for row in found] == ["zero", "one"]
    assert images(found, recipe(tmp_path)) == [b"JPEG 0", b"JPEG 1"]


def test_keys_with_dots_are_taken_for_what_they_are(tmp_path: Path) -> None:
    members = [(f"img.v1_{n}.{kind}", f"{kind} {n}".encode()) for n in range(3) for kind in ("jpg", "txt")]
    write_tar(tmp_path / "t.tar", members)
    assert [row["caption"] for row in rows(tmp_path / "t.tar")] == ["txt 0", "txt 1", "txt 2"]


@pytest.mark.parametrize(
    "order", ["a.jpg b.jpg a.txt b.txt", "a.json b.json b.jpg a.jpg", "x.v1.jpg x.v2.jpg x.v1.txt"]
)
def test_a_tar_in_which_captions_lie_apart_from_their_images_is_refused(tmp_path: Path, order: str) -> None:
    write_tar(tmp_path / "t.tar", [(name, b"{}") for name in order.split()])
    with pytest.raises(RecipeError, match=r"source\.path: \S+ is not next to its image in .*t\.tar.*--sort=name"):
        rows(tmp_path / "t.tar")


@pytest.mark.parametrize("between", [[], [("b.jpg", b"JPEG b"), ("b.txt", b"b")]])
@pytest.mark.parametrize("caption_first", [False, True])
def test_images_of_one_name_in_a_tar_are_all_rows(
    tmp_path: Path, between: list[tuple[str, bytes]], caption_first: bool
) -> None:
    samples = [[("a.jpg", b"JPEG 1"), ("a.txt", b"one")], between, [("a.jpg", b"JPEG 2"), ("a.txt", b"two")]]
    members = [member for sample in samples for member in (sample[::-1] if caption_first else sample)]
    write_tar(tmp_path / "t.tar", members)
    found = [row for row in rows(tmp_path / "t.tar") if row["caption"] != "b"]
    assert [row["caption"] for row in found] == ["one", "two"]
    assert images(found, recipe(tmp_path)) == [b"JPEG 1", b"JPEG 2"]
    write_tar(tmp_path / "t.tar", members[:2])
    assert found[0]["key"] == rows(tmp_path / "t.tar")[0]["key"] != found[1]["key"]
    assert isinstance(images(found, recipe(tmp_path))[1], OSError)


def test_names_in_a_tar_that_differ_in_what_is_no_text_are_told_apart(tmp_path: Path) -> None:
    write_tar(tmp_path / "t.tar", [("caf\udce9.jpg", b"e"), ("caf\udce8.jpg", b"f")])
    found = rows(tmp_path / "t.tar")
    assert len({row["key"] for row in found}) == 2
    assert images(found, recipe(tmp_path)) == [b"e", b"f"]


def test_texts_without_an_image_and_images_without_texts_are_in_order(tmp_path: Path) -> None:
    names = ["a.jpg", "b.txt", "c.jpg", "c.txt", "d.json", "e.jpg", "e.json", "e.json", "c/a.txt"]
    write_tar(tmp_path / "t.tar", [(name, b"{}") for name in names])
    assert [row["url"].rpartition("#")[2] for row in rows(tmp_path / "t.tar")] == ["a.jpg", "c.jpg", "e.jpg"]


@pytest.mark.parametrize("text", [None, b"one"])
def test_captions_in_json_next_to_an_image_that_are_no_text(tmp_path: Path, text: bytes | None) -> None:
    members = [("a.jpg", b"JPEG"), ("a.json", b'{"caption": ["one", "two"]}'), *([("a.txt", text)] if text else [])]
    (tmp_path / "folder").mkdir()
    for name, data in members:
        (tmp_path / "folder" / name).write_bytes(data)
    write_tar(tmp_path / "t.tar", members)
    for place in ("folder", "t.tar"):
        (row,) = rows(tmp_path / place)
        assert row["extra"] == ("{}" if text else '{"unreadable_caption":["one","two"]}')
        assert row["caption"] == ("one" if text else '["one","two"]')


def test_tables_next_to_images_are_refused_unless_one_of_them_is_named(tmp_path: Path) -> None:
    write_table(tmp_path / "t.parquet")
    (tmp_path / "preview.png").write_bytes(b"PNG")
    with pytest.raises(RecipeError, match=r"source\.path: holds tables .*t\.parquet.* and images .*preview\.png"):
        rows(tmp_path)
    assert len(rows(tmp_path / "*.parquet")) > 1


@pytest.mark.integration
def test_the_same_sources_in_a_bucket(tmp_path: Path, bucket: dict[str, Any]) -> None:
    write_folder(tmp_path / "folder")
    write_tar(tmp_path / "t.tar", [*MEMBERS, *((f"many/{n}.jpg", bytes([n]) * 1000) for n in range(200))])
    write_table(tmp_path / "t.parquet")
    write_table(tmp_path / "t.jsonl")
    packed(tmp_path / "t.jsonl", "zst")
    there = Storage("s3://bucket/data", bucket["storage"])
    for path in tmp_path.rglob("*"):
        if path.is_file() and "s3" not in path.parts:
            there.write(str(path.relative_to(tmp_path)), path.read_bytes())

    for options in ({"storage": bucket["storage"]}, {}):  # the source's own; the dataset's
        settings = {"dataset": "unused"} if options else bucket
        for name in ("folder", "t.tar", "t.parquet", "t.jsonl.zst", "*.tar"):
            source = {"path": f"s3://bucket/data/{name}", **options}
            where = Recipe.model_validate({**settings, "source": source})
            found = [row for table in SourceReader(where).tables() for row in table.to_pylist()]
            local = rows(tmp_path / name)
            assert urls_and_captions(found)[0][1] == urls_and_captions(local)[0][1]
            assert len(found) == len(local)
            if found[0]["file"]:
                assert images(found, where) == images(local, recipe(tmp_path))


def opened_below(folder: Path) -> list[str]:
    """Return the files below a folder that this process holds open. Other descriptors may come and go at any time."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            found.append(str(descriptor.readlink()))
    return [path for path in found if path.startswith(f"{folder}/")]


def test_an_image_that_cannot_be_read_is_reported_and_the_others_are_read(tmp_path: Path) -> None:
    for n in range(100):
        (tmp_path / f"{n:03}.jpg").write_bytes(bytes([n]) * 10)
    found = rows(tmp_path)
    (tmp_path / "003.jpg").unlink()
    found[5]["offset"] = 4
    answers = images(found, recipe(tmp_path))
    assert opened_below(tmp_path) == []
    assert {n: type(answer) for n, answer in enumerate(answers) if not isinstance(answer, bytes)} == {
        3: FileNotFoundError,
        5: OSError,
    }
    assert "005.jpg has changed since it was planned: 6 of 10 bytes" in str(answers[5])
    assert answers[99] == b"c" * 10


def test_an_image_of_a_folder_is_read_as_it_is_now(tmp_path: Path) -> None:
    for name in ("cut.jpg", "grown.jpg"):
        (tmp_path / name).write_bytes(b"cut")
    found = rows(tmp_path)
    (tmp_path / "cut.jpg").write_bytes(b"the whole image")
    (tmp_path / "grown.jpg").write_bytes(bytes(100))
    where = recipe(tmp_path)
    cut, grown = read_images([span_of(row, number) for number, row in enumerate(found)], where, most=50)
    assert cut == (0, b"the whole image")
    assert isinstance(grown[1], TooLarge)


@pytest.mark.parametrize("names", [["a.jpg", "b.jpg"], ["ä.jpg", "b.jpg"], ["a" * 150 + ".jpg", "b" * 150 + ".jpg"]])
def test_a_tar_that_was_rewritten_gives_no_image_of_another(tmp_path: Path, names: list[str]) -> None:
    members = [(name, name.encode()[:5]) for name in names]
    write_tar(tmp_path / "t.tar", members)
    found = rows(tmp_path / "t.tar")
    assert images(found, recipe(tmp_path)) == [data for _, data in members]
    write_tar(tmp_path / "t.tar", members[::-1])
    for answer in images(found, recipe(tmp_path)):
        assert isinstance(answer, OSError)
        assert "t.tar has changed since it was planned" in str(answer)


def test_captions_as_windows_writes_them(tmp_path: Path) -> None:
    """UTF-16, and UTF-8 with a byte order mark, in folders and tars."""
    texts = {"a": "größe".encode("utf-16"), "b": b"\xfe\xff" + "größe".encode("utf-16-be"), "c": b"\xef\xbb\xbfcat\n"}
    members = [member for name, text in texts.items() for member in ((f"{name}.jpg", b"x"), (f"{name}.txt", text))]
    (tmp_path / "folder").mkdir()
    for name, data in members:
        (tmp_path / "folder" / name).write_bytes(data)
    write_tar(tmp_path / "x.tar", members)
    for path in ("folder", "x.tar"):
        assert sorted(row["caption"] for row in rows(tmp_path / path)) == ["cat", "größe", "größe"]
