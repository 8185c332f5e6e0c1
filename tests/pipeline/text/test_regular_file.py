"""What a reader could wait for without end is refused where a user names it: named pipes, devices."""

import os
from pathlib import Path

import pytest

from capstan.cluster.cli import run
from capstan.pipeline.text.regular_file import NotRegular, regular


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe.yaml")
    return tmp_path / "pipe.yaml"


def test_files_folders_and_pipes_of_the_shell_pass(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    for path in (tmp_path, tmp_path / "file", tmp_path / "link"):
        assert regular(path) == str(path)
    reading, writing = os.pipe()
    assert regular(f"/dev/fd/{reading}", or_pipe=True) == f"/dev/fd/{reading}"
    with pytest.raises(NotRegular):
        regular(f"/dev/fd/{reading}")
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("or_pipe", [False, True])
def test_named_pipes_and_devices_do_not(pipe: Path, or_pipe: bool) -> None:
    (pipe.parent / "link").symlink_to(pipe)
    for path in (pipe, pipe.parent / "link", "/dev/zero"):
        with pytest.raises(NotRegular, match="named pipe or a device"):
            regular(path, or_pipe=or_pipe)
    with pytest.raises(FileNotFoundError):
        regular(pipe.parent / "nothing")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("command", ["build", "train"])
def test_commands_end_at_once(pipe: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, str(pipe)]) == 2
    assert "named pipe" in capsys.readouterr().err


@pytest.mark.timeout(60)
def test_captions_are_not_taken_from_one(pipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["captions", "import", str(tmp_path), "mine", str(pipe)]) == 2
    assert "named pipe" in capsys.readouterr().err
