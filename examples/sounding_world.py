"""The captioned world, heard: a folder of sounds with captions, for `capstan cut examples/audio_cut.yaml`

    python examples/sounding_world.py out/sounding [--count 2064] [--rate 3000]

A sound of two seconds has one to three things, from left to right in time: a thing's colour is its pitch, its shape its
rhythm. NAME.wav is a sound, NAME.txt its caption.
"""

from __future__ import annotations

import argparse
import wave
from pathlib import Path

from capstan.pipeline.world.moving.captions import heard
from capstan.pipeline.world.moving.render import samples_of
from capstan.pipeline.world.moving.scene import draw_moving
from capstan.pipeline.world.scene import Vocabulary

VOCABULARY = Vocabulary(
    shapes=("circle", "square", "triangle"),
    colours=("red", "green", "blue", "yellow", "purple", "cyan"),
    textures=("plain",),
)
FRAMES, FPS = 16, 8


def write_sounds(folder: Path, count: int, rate: int, seed: int = 0) -> None:
    """Write `count` sounds and their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        scene = draw_moving(seed, index, VOCABULARY, frames=FRAMES, fps=FPS, entries=True)
        with wave.open(str(folder / f"{index:06d}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(samples_of(scene, rate).astype("<i2").tobytes())
        (folder / f"{index:06d}.txt").write_text(heard(scene) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=2064)
    parser.add_argument("--rate", type=int, default=3000)  # the highest pitch, cyan, is 1,327 Hz
    chosen = parser.parse_args()
    write_sounds(chosen.folder, chosen.count, chosen.rate)
    print(f"{chosen.folder}: {chosen.count} sounds")
