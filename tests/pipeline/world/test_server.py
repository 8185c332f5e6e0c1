"""The site over real HTTP: rows that lead to images, and all defects."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from capstan.pipeline.config import WorldSource
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.world.captions import alt, descriptive, facts, short
from capstan.pipeline.world.defects import DEFECTS, FORMATS, defect, file_format, shown_index
from capstan.pipeline.world.oracle import aggregate, score
from capstan.pipeline.world.render import render
from capstan.pipeline.world.scene import vocabulary
from capstan.pipeline.world.server import TINY, Site, file_bytes
from capstan.pipeline.world.table import HOST, index_of_url, rows, scene_of_url, url_of

WORLD = WorldSource(scenes=400, size=64, seed=3)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site(WORLD) as served:
        yield served


def fetch(site: Site, url: str) -> tuple[HTTPResponse, bytes]:
    assert url.startswith(f"http://{HOST}/")
    with urllib.request.urlopen(url.replace(HOST, site.address), timeout=60) as response:
        return response, response.read()


def indices(wrong: str | None, number: int = 3) -> list[int]:
    found = [index for index in range(WORLD.scenes) if defect(WORLD, index) == wrong]
    assert len(found) >= number
    return found[:number]


def shown(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def test_rows_lead_to_images_of_their_truth(site: Site) -> None:
    scores = []
    for row in list(rows(WORLD))[:60]:
        if defect(WORLD, row["world_index"]) not in ("missing", "html", "cut", "tiny"):
            _, data = fetch(site, row["url"])
            scores.append(score(scene_of_url(WORLD, row["url"]), shown(data)))
    assert all(mean >= 0.98 for mean in aggregate(scores).values())


def test_robots_are_welcome(site: Site) -> None:
    _, body = fetch(site, f"http://{HOST}/robots.txt")
    assert body.decode() == "User-agent: *\nAllow: /\n"


def test_missing_images_are_404(site: Site) -> None:
    other = WORLD.model_copy(update={"seed": 4})
    for url in (*(url_of(WORLD, index) for index in indices("missing")), url_of(other, 0)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            fetch(site, url)
        assert caught.value.code == 404
        caught.value.close()


def test_some_images_are_web_pages(site: Site) -> None:
    types = set()
    for index in indices("html", 8):
        response, body = fetch(site, url_of(WORLD, index))
        assert body.startswith(b"<!DOCTYPE html>")
        types.add(response.headers.get_content_type())
    assert types == {"text/html", "image/jpeg"}


def test_cut_files_end_early(site: Site) -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    for index in indices("cut"):
        _, data = fetch(site, url_of(WORLD, index))
        with pytest.raises(OSError, match="truncated"):
            Image.open(io.BytesIO(data)).load()


def test_tiny_images_are_tiny(site: Site) -> None:
    for index in indices("tiny"):
        _, data = fetch(site, url_of(WORLD, index))
        assert Image.open(io.BytesIO(data)).size == (TINY, TINY)


def test_duplicates_copy_an_earlier_image(site: Site) -> None:
    for index in indices("exact_duplicate"):
        original = shown_index(WORLD, index)
        assert original < index
        assert defect(WORLD, original) is None
        assert fetch(site, url_of(WORLD, index))[1] == fetch(site, url_of(WORLD, original))[1]
    for index in indices("near_duplicate"):
        original = shown_index(WORLD, index)
        copy, first = (shown(fetch(site, url_of(WORLD, i))[1]).astype(float) for i in (index, original))
        assert 0.5 < np.abs(copy - first).mean() < 8


def test_rotated_images_are_upright_to_a_viewer(site: Site) -> None:
    turns = set()
    for index in indices("rotated", 6):
        _, data = fetch(site, url_of(WORLD, index))
        turns.add(Image.open(io.BytesIO(data)).getexif()[0x0112])
        upright = render(scene_of_url(WORLD, url_of(WORLD, index)), WORLD.size)
        assert np.abs(shown(data).astype(float) - upright).mean() < 3
    assert len(turns) > 1
    assert turns <= {3, 6, 8}


def test_sound_files_come_in_several_formats(site: Site) -> None:
    sound = [index for index in range(WORLD.scenes) if defect(WORLD, index) is None]
    for kind in ("jpeg", *FORMATS):
        index = next(index for index in sound if file_format(WORLD, index) == kind)
        response, data = fetch(site, url_of(WORLD, index))
        assert response.headers.get_content_type() == f"image/{kind}"
        assert (Image.open(io.BytesIO(data)).format or "").lower() == kind


def test_defects_keep_their_shares() -> None:
    drawn = Counter(defect(WORLD, index) for index in range(4000))
    assert sum(DEFECTS.values()) == pytest.approx(0.2)
    for name, share in DEFECTS.items():
        assert drawn[name] / 4000 == pytest.approx(share, abs=0.012)


def test_a_world_without_defects_has_none() -> None:
    world = WORLD.model_copy(update={"defects": False})
    for index in range(300):
        assert defect(world, index) is None
        assert shown_index(world, index) == index
        assert file_format(world, index) == "jpeg"


def test_a_larger_world_only_adds_rows() -> None:
    few, many = WORLD.model_copy(update={"scenes": 50}), WORLD.model_copy(update={"scenes": 120})
    assert list(rows(many))[:50] == list(rows(few))


def test_captions_follow_the_worlds_setting() -> None:
    vocab = vocabulary(WORLD)
    writers = {"alt": None, "short": short, "descriptive": descriptive}
    for kind, write in writers.items():
        world = WORLD.model_copy(update={"captions": kind, "scenes": 80})
        for row in rows(world):
            scene = scene_of_url(world, row["url"])
            wanted = write(scene) if write else alt(scene, vocab, row=row["world_index"])
            assert row["caption"] == wanted
            assert index_of_url(world, row["url"]) == row["world_index"]
    assert facts(descriptive(scene_of_url(WORLD, url_of(WORLD, 0)))).count is not None


def test_urls_name_everything_that_changes_an_image() -> None:
    changes = [{"seed": 9}, {"size": 32}, {"defects": False}, {"shapes": ["star"]}, {"max_objects": 2}]
    folders = {url_of(WORLD.model_copy(update=change), 0) for change in [{}, *changes]}
    assert len(folders) == len(changes) + 1
    assert url_of(WORLD.model_copy(update={"captions": "short"}), 0) == url_of(WORLD, 0)
    for url in ("http://example.org/00000001.jpg", url_of(WORLD.model_copy(update={"seed": 9}), 1)):
        with pytest.raises(ValueError, match="not a URL"):
            scene_of_url(WORLD, url)


def test_bytes_are_the_same_each_time() -> None:
    vocab = vocabulary(WORLD)
    for index in range(60):
        assert file_bytes(WORLD, vocab, index) == file_bytes(WORLD, vocab, index)


def test_an_impossible_world_is_refused_before_a_server_starts() -> None:
    with pytest.raises(RecipeError):
        Site(WorldSource(shapes=["blob"]))


@pytest.mark.integration
def test_the_site_dies_with_its_parent(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(
        "import time\n"
        "from capstan.pipeline.config import WorldSource\n"
        "from capstan.pipeline.world.server import Site\n"
        "with Site(WorldSource()) as site:\n"
        "    print(site._process.pid, site.address, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        address = parent.stdout.readline().split()[1]
        urllib.request.urlopen(f"http://{address}/robots.txt", timeout=60).close()
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://{address}/robots.txt", timeout=1).close()
        except OSError:
            return
        time.sleep(0.1)
    pytest.fail("the site still answers two minutes after its parent was killed")
