"""A small real disk that can be full, hold no more files, or be read-only; mounting it takes root."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


class Disk:
    """A tmpfs which can be filled, and emptied again. Skips the test if mounting is not permitted."""

    def __init__(self, folder: Path, options: str = "size=64m,nr_inodes=4096") -> None:
        self.folder, self._filler = folder, folder / "filler"
        folder.mkdir()
        self._mount(options)

    def _mount(self, options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and "remount" not in options:
            pytest.skip(f"mounting a disk is not permitted here: {done.stderr.strip()}")
        return done.returncode == 0

    def resize(self, size: int) -> None:
        assert self._mount(f"remount,size={size}")

    def leave_bytes(self, size: int) -> None:
        free = os.statvfs(self.folder)
        with self._filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_bsize - size))

    def leave_files(self, count: int) -> None:
        self._filler.mkdir()
        for number in range(os.statvfs(self.folder).f_favail - count):
            (self._filler / str(number)).touch()

    def empty(self) -> None:
        """Remove what fills the disk."""
        subprocess.run(["rm", "-rf", str(self._filler)], check=True)

    def read_only(self, on: bool = True) -> bool:
        """Remount; False if a file is open for writing just now."""
        return self._mount("remount,ro" if on else "remount,rw")

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)
