"""Frames → what moves how; samples → what sounds when: judged by known colours, shapes and pitches, nothing is learned

Each frame is parsed as a still image, and things are followed by their colour. Sound is cut into notes by its energy,
a note's pitch is the peak of its spectrum, and notes of one pitch are one thing, known by their number and length.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from capstan.pipeline.world.captions import overlap
from capstan.pipeline.world.moving.captions import Stated, StatedThing
from capstan.pipeline.world.moving.render import frames_of, samples_of, starts_of
from capstan.pipeline.world.moving.scene import LEAST_MOVE, PITCHES, RHYTHMS, STILL, MovingScene, draw_moving
from capstan.pipeline.world.oracle import aggregate, parse
from capstan.pipeline.world.scene import Thing, Vocabulary

FRAME_MEASURES: Final = ("background", "colours", "count", "colour_shape", "motion", "steady")
SOUND_MEASURES: Final = ("pitch", "pitch_rhythm", "count", "in_order")
_MOVED: Final = LEAST_MOVE / 2  # of the side: from here on a thing moves
_WINDOW_S: Final = 0.01
_LOUD: Final = 0.25  # of the loudest window's amplitude: from here on a note sounds
_LEAST_NOTE_S: Final = 0.04
_SEMITONES: Final = 0.08  # relative distance up to which a frequency is a pitch
_PAD: Final = 8192  # points of a note's spectrum


@dataclass(frozen=True)
class Followed:
    """A thing followed through the frames: its shape is the one seen most often, its entry the first frame with it."""

    colour: str
    shape: str
    move: str
    enters: int
    distance: float  # of its first and last place, in sides


@dataclass(frozen=True)
class Watched:
    """What the frames show; `counts` is the number of things in each."""

    background: str
    things: tuple[Followed, ...]
    counts: tuple[int, ...]


def watch(frames: np.ndarray) -> Watched:
    """Parse a clip: uint8 RGB [frames, side, side, 3]. A colour that fewer than two frames show is not a thing."""
    seen = [parse(frame) for frame in frames]
    background = Counter(one.background for one in seen).most_common(1)[0][0]
    tracks: dict[str, list[tuple[int, Thing]]] = {}
    for number, one in enumerate(seen):
        for thing in one.things:
            tracks.setdefault(thing.colour, []).append((number, thing))
    things = [_followed(colour, track) for colour, track in tracks.items() if len({n for n, _ in track}) >= 2]
    return Watched(background, tuple(things), tuple(len(one.things) for one in seen))


def _followed(colour: str, track: list[tuple[int, Thing]]) -> Followed:
    first, last = track[0][1], track[-1][1]
    dx, dy = last.x - first.x, last.y - first.y
    move = STILL
    if max(abs(dx), abs(dy)) >= _MOVED:
        move = _direction(dx, dy)
    shape = Counter(thing.shape for _, thing in track).most_common(1)[0][0]
    return Followed(colour, shape, move, track[0][0], math.hypot(dx, dy))


def _direction(dx: float, dy: float) -> str:
    if abs(dx) > abs(dy):
        return "moves right" if dx > 0 else "moves left"
    return "moves down" if dy > 0 else "moves up"


def score_frames(scene: MovingScene, seen: Watched) -> dict[str, float]:
    """Score how well frames match a scene; each of FRAME_MEASURES in [0, 1].

    `colours`, `colour_shape` and `motion` are the shares of the scene's colours, of its (colour, shape) pairs and of
    its (colour, shape, move) triples that are found. `count` is whether the number of things is right, `steady` the
    share of frames whose number is.
    """
    things = tuple(StatedThing(m.thing.colour, m.thing.shape, m.move) for m in scene.things)
    counts = [len(scene.still(number).things) for number in range(scene.frames)]
    return score_stated(Stated(scene.background, len(things), things), seen, counts)


def score_stated(stated: Stated, seen: Watched, counts: Sequence[int] | None = None) -> dict[str, float]:
    """Score frames as `score_frames` does, by what a caption states; nan for a background that it does not name.

    `counts` is the number of things in each frame; None: the same in all.
    """
    wanted, found = stated.things, seen.things
    number = len(wanted) if stated.count is None else stated.count
    counts = [number] * len(seen.counts) if counts is None else counts[: len(seen.counts)]
    pairs = zip(counts, seen.counts, strict=False)
    return {
        "background": math.nan if stated.background is None else float(seen.background == stated.background),
        "colours": overlap([t.colour for t in found], [t.colour for t in wanted]),
        "count": float(len(found) == number),
        "colour_shape": overlap([f"{t.colour} {t.shape}" for t in found], [f"{t.colour} {t.shape}" for t in wanted]),
        "motion": overlap(
            [f"{t.colour} {t.shape} {t.move}" for t in found], [f"{t.colour} {t.shape} {t.move}" for t in wanted]
        ),
        "steady": sum(a == b for a, b in pairs) / max(1, len(counts)),
    }


@dataclass(frozen=True)
class Heard:
    """Something that sounds: the colour of its pitch, the shape of its rhythm, and when it starts, in seconds."""

    colour: str
    shape: str
    start_s: float


def listen(samples: np.ndarray, rate: int) -> tuple[Heard, ...]:
    """Return what sounds, in the order of their starts: int16 [samples, channels].

    Neighbouring notes of one pitch are one thing. A note whose pitch is none of the known ones is left out.
    """
    mono = samples.astype(np.float64).mean(axis=1) / 32_768
    things: list[Heard] = []
    run: list[tuple[float, float]] = []  # start and length of the notes of the thing that sounds
    colour = ""
    for start, stop in _notes(mono, rate):
        note = _pitch(mono[start:stop], rate)
        if note is None:
            continue
        if run and note != colour:
            things.append(_heard(colour, run))
            run = []
        colour = note
        run.append((start / rate, (stop - start) / rate))
    return (*things, _heard(colour, run)) if run else tuple(things)


def _notes(mono: np.ndarray, rate: int) -> list[tuple[int, int]]:
    """Return where notes start and stop, in samples: where the amplitude exceeds a share of the loudest."""
    window = max(1, round(_WINDOW_S * rate))
    count = len(mono) // window
    level = np.sqrt(np.square(mono[: count * window].reshape(count, window)).mean(axis=1)) if count else np.zeros(0)
    loud = np.concatenate([[False], level > max(_LOUD * level.max(initial=0.0), 1e-3), [False]])
    edges = np.flatnonzero(loud[1:] != loud[:-1])
    spans = [(int(a) * window, int(b) * window) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return [(a, b) for a, b in spans if b - a >= _LEAST_NOTE_S * rate]


def _pitch(note: np.ndarray, rate: int) -> str | None:
    """Return the colour whose pitch is the spectrum's peak; None if none is near."""
    spectrum = np.abs(np.fft.rfft(note * np.hanning(len(note)), _PAD))
    hertz = float(spectrum.argmax()) * rate / _PAD
    nearest = min(PITCHES, key=lambda name: abs(math.log(max(hertz, 1.0) / PITCHES[name])))
    return nearest if abs(hertz / PITCHES[nearest] - 1) <= _SEMITONES else None


def _heard(colour: str, notes: list[tuple[float, float]]) -> Heard:
    """Return the thing whose rhythm these notes are most like: by their number, then by their length."""
    length = sum(duration for _, duration in notes) / len(notes)

    def unlike(shape: str) -> tuple[int, float]:
        count, own, _ = RHYTHMS[shape]
        return abs(count - len(notes)), abs(math.log(own / length))

    return Heard(colour, min(RHYTHMS, key=unlike), notes[0][0])


def score_sound(scene: MovingScene, found: Sequence[Heard]) -> dict[str, float]:
    """Score how well a sound matches a scene; each of SOUND_MEASURES in [0, 1].

    `pitch` and `pitch_rhythm` are the shares of the scene's colours and (colour, shape) pairs that sound; `count` is
    whether the number of things is right, `in_order` whether all things sound, and nothing else, in their order.
    """
    return score_heard([(m.thing.colour, m.thing.shape) for m in scene.things], found)


def score_heard(wanted: Sequence[tuple[str, str]], found: Sequence[Heard]) -> dict[str, float]:
    """Score a sound as `score_sound` does; `wanted` are the colours and shapes that shall sound, in their order."""
    heard = [(one.colour, one.shape) for one in found]
    return {
        "pitch": overlap([colour for colour, _ in heard], [colour for colour, _ in wanted]),
        "pitch_rhythm": overlap([" ".join(one) for one in heard], [" ".join(one) for one in wanted]),
        "count": float(len(heard) == len(wanted)),
        "in_order": float(heard == list(wanted)),
    }


def in_time(seen: Watched, found: Sequence[Heard], fps: float) -> float:
    """Return the share of the things seen that start to sound within one frame of their entry (nan: none is seen)."""
    if not seen.things:
        return math.nan
    starts = {one.colour: one.start_s for one in reversed(found)}
    right = [
        thing.colour in starts and abs(starts[thing.colour] * fps - thing.enters) <= 1 + 1e-6 for thing in seen.things
    ]
    return sum(right) / len(right)


def accuracy_on_truth(
    size: int,
    vocab: Vocabulary | None = None,
    *,
    scenes: int = 100,
    seed: int = 1_000_003,
    frames: int = 16,
    fps: int = 8,
    rate: int = 4000,
    noise: float = 0.0,
) -> dict[str, dict[str, float]]:
    """Return how far the oracle can be trusted: its scores on drawings and sounds that are right, and by chance.

    `frames` and `sound` are scores of clips against their own scene, `frames_chance` and `sound_chance` against that of
    the clip before; `noise` is added to the sound, as a share of full scale. Things enter one after the other.
    """
    vocab = vocab or Vocabulary(textures=("plain",))
    drawn = [draw_moving(seed, index, vocab, frames=frames, fps=fps, entries=True) for index in range(scenes)]
    random = np.random.default_rng(seed)
    seen, found = list[Watched](), list[tuple[Heard, ...]]()
    for scene in drawn:
        seen.append(watch(frames_of(scene, size)))
        sound = samples_of(scene, rate).astype(np.float64)
        sound += noise * 32_767 * random.standard_normal(sound.shape)
        found.append(listen(np.clip(np.rint(sound), -32_768, 32_767).astype(np.int16), rate))
    before = [*drawn[-1:], *drawn[:-1]]
    pairs = list(zip(seen, found, strict=True))
    late = [*found[-1:], *found[:-1]]
    return {
        "frames": aggregate([score_frames(scene, one) for scene, one in zip(drawn, seen, strict=True)]),
        "frames_chance": aggregate([score_frames(scene, one) for scene, one in zip(before, seen, strict=True)]),
        "sound": aggregate([score_sound(scene, one) for scene, one in zip(drawn, found, strict=True)]),
        "sound_chance": aggregate([score_sound(scene, one) for scene, one in zip(before, found, strict=True)]),
        "both": aggregate([{"in_time": in_time(one, heard, fps)} for one, heard in pairs]),
        "both_chance": aggregate([{"in_time": in_time(a, b, fps)} for a, b in zip(seen, late, strict=True)]),
    }


def entries_of(scene: MovingScene) -> list[tuple[int, float]]:
    """Return each thing's entry as a frame, and when it starts to sound in seconds."""
    return list(zip((moving.enters for moving in scene.things), starts_of(scene), strict=True))
