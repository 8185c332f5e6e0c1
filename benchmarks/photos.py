"""Photos for the benchmarks, made from those of scikit-image and scikit-learn, and an nginx that serves them.

Each is a random part of a photo, perhaps mirrored, with slightly changed brightness and a little noise. The square
root of its area is log-normal around 740 pixels, and it is saved with one of several JPEG qualities. In pixels and
bytes they resemble a crawl of the web (about 105 kB each).
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import cv2
import numpy as np

PER_FOLDER = 1000


def make_photos(folder: Path, count: int) -> list[Path]:
    """Write `count` JPEGs to `folder` (NNN/NNNNNN.jpg); existing ones stay."""
    paths = [folder / f"{number // PER_FOLDER:03d}" / f"{number:06d}.jpg" for number in range(count)]
    missing = [(number, path) for number, path in enumerate(paths) if not path.exists()]
    if missing:
        with multiprocessing.Pool() as pool:
            pool.starmap(_make, missing, chunksize=64)
    return paths


def _make(number: int, path: Path) -> None:
    cv2.setNumThreads(1)
    random = np.random.default_rng(number)
    photo = originals()[random.integers(len(originals()))]
    side = 740 * math.exp(random.normal(0, 0.35))
    aspect = math.exp(random.uniform(math.log(3 / 4), math.log(16 / 9)))
    width, height = max(64, round(side * aspect**0.5)), max(64, round(side / aspect**0.5))
    pixels = cv2.resize(_part(photo, width / height, random), (width, height), interpolation=cv2.INTER_CUBIC)
    if random.random() < 0.5:
        pixels = pixels[:, ::-1]
    noise = random.normal(0, random.uniform(0, 6), (height // 2 + 1, width // 2 + 1, 1)).astype(np.float32)
    noise = cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)[:, :, None]
    pixels = np.clip(pixels * random.uniform(0.8, 1.15) + noise, 0, 255).astype(np.uint8)
    quality = int(random.choice([75, 80, 85, 90, 92], p=[0.2, 0.2, 0.25, 0.25, 0.1]))
    _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_bytes(data.tobytes())
    partial.replace(path)


def _part(photo: np.ndarray, aspect: float, random: np.random.Generator) -> np.ndarray:
    height, width = photo.shape[:2]
    share = random.uniform(0.6, 1.0)
    part_w, part_h = (round(height * aspect), height) if width / height > aspect else (width, round(width / aspect))
    part_w, part_h = max(8, int(part_w * share)), max(8, int(part_h * share))
    left, top = random.integers(width - part_w + 1), random.integers(height - part_h + 1)
    return photo[top : top + part_h, left : left + part_w]


@cache
def originals() -> list[np.ndarray]:
    """Return the BGR photographs of the installed packages."""
    import skimage.data
    import sklearn.datasets

    images = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket()]
    images += list(sklearn.datasets.load_sample_images().images)
    return [cv2.cvtColor(image, cv2.COLOR_RGB2BGR) for image in images]


@contextlib.contextmanager
def served(folder: Path, scratch: Path) -> Iterator[str]:
    """Yield the loopback URL at which nginx serves `folder`."""
    nginx = shutil.which("nginx") or "/usr/sbin/nginx"
    if not Path(nginx).exists():
        raise SystemExit("nginx is missing: apt-get install nginx-light")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    user = "user root;" if os.geteuid() == 0 else ""
    scratch.mkdir(parents=True, exist_ok=True)
    config = scratch / "nginx.conf"
    config.write_text(
        f"""{user} worker_processes 1; daemon off; pid {scratch}/nginx.pid; error_log {scratch}/error.log;
        events {{ worker_connections 4096; }}
        http {{
            access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000; types {{ image/jpeg jpg; }}
            client_body_temp_path {scratch}/t1; proxy_temp_path {scratch}/t2; fastcgi_temp_path {scratch}/t3;
            uwsgi_temp_path {scratch}/t4; scgi_temp_path {scratch}/t5;
            server {{ listen 127.0.0.1:{port} backlog=4096; root {folder.resolve()}; }}
        }}"""
    )
    process = subprocess.Popen([nginx, "-c", str(config), "-p", str(scratch)])
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
