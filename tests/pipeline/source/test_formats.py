"""A folder in which several kinds of files lie: nothing is read twice, and skipped files are logged."""

import logging
from pathlib import Path

import pytest
from source_files import MEMBERS, recipe, rows, urls_and_captions, write_table, write_tar

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.source import SourceReader


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """A folder as img2dataset writes it: a table next to each tar repeats its samples."""
    write_tar(tmp_path / "00000.tar", MEMBERS)
    write_table(tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("settings", [{}, {"format": "webdataset"}])
def test_tables_next_to_tars_of_their_name_are_not_rows_again(
    tars: Path, settings: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert [caption for _, caption in urls_and_captions(rows(tars, **settings))] == ["a cat", "a dog"]
    assert "skipped 2 files whose names are not those of tables" in caplog.text
    assert len(rows(tars / "*.parquet")) == len(rows(tars, format="parquet")) == 3
    both = {"path": [str(tars / "00000.tar"), str(tars / "00000.parquet")]}
    where = Recipe.model_validate({"dataset": "unused", "source": both})
    assert sum(len(table) for table in SourceReader(where).tables()) == 5


@pytest.mark.parametrize("names", [["t.csv", "t.parquet"], ["a/t.jsonl", "b/t.tsv"], ["t.parquet", "urls.txt"]])
@pytest.mark.parametrize("glob", ["", "**"])
def test_tables_of_several_kinds_are_refused_unless_one_is_named(tmp_path: Path, names: list[str], glob: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_table(tmp_path / name)
    with pytest.raises(RecipeError, match=r"source\.path: .* holds tables of several kinds .*glob.*source\.format"):
        rows(tmp_path / glob)
    kind = names[1].rpartition(".")[2]
    assert len(rows(tmp_path / glob, format=kind)) == len(rows(tmp_path / f"**/*.{kind}")) == 3


@pytest.mark.parametrize("name", ["README.txt", "LICENSE.txt", "licence-data.TXT", "Read_me.txt", "notice.txt"])
def test_texts_about_the_tables_are_no_addresses(tmp_path: Path, name: str) -> None:
    write_table(tmp_path / "t.csv")
    (tmp_path / name).write_text("These images\nwere found by\n")
    assert len(rows(tmp_path)) == 3
    assert len(rows(tmp_path / name)) == 2  # named by itself
    (tmp_path / "t.csv").unlink()
    with pytest.raises(RecipeError, match=r"source\.format: cannot tell the format of"):
        rows(tmp_path)


def test_a_folder_of_images_may_hold_texts_about_them(tmp_path: Path) -> None:
    for name in ("README.jpg", "README.txt", "LICENSE.txt"):
        (tmp_path / name).write_text("a caption")
    assert urls_and_captions(rows(tmp_path)) == [(str(tmp_path / "README.jpg"), "a caption")]
    assert SourceReader(recipe(tmp_path)).signature == SourceReader(recipe(tmp_path)).signature


def test_globs_that_name_both_read_both(tars: Path) -> None:
    both = {"path": [str(tars / "*.tar"), str(tars / "*.parquet")]}
    where = Recipe.model_validate({"dataset": "unused", "source": both})
    assert sum(len(table) for table in SourceReader(where).tables()) == 5


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_with_a_format_named_what_is_no_table_by_its_name_is_left_out(tmp_path: Path, kind: str) -> None:
    """Folders as a hub, Spark and Energon leave them."""
    write_table(tmp_path / f"t.{kind}")
    for name in (
        ".gitattributes",
        "README.md",
        ".nv-meta/index.sqlite",
        ".nv-meta/index.uuid",
        f".t.{kind}.crc",
        "_SUCCESS",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no table")
    assert len(rows(tmp_path, format=kind)) == 3
