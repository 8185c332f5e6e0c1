"""CPU seconds to cut a video into clips, next to a bare loop over PyAV that decodes, scales and encodes the same.

    python benchmarks/clips.py [--videos 6] [--seconds 20] [--rounds 5]

Videos are 640 × 360, 24 per second, H.264: photographs' smooth noise that pans, with a cut every few seconds. The bare
loop does what a script does that someone writes in an hour: no limits, no checks, no scenes, no sound, no JPEG.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from fractions import Fraction

import av
import cv2
import numpy as np

from capstan.pipeline.clips.clip import CutFile, cut_file
from capstan.pipeline.config.cut import Cut

WIDTH, HEIGHT, FPS = 640, 360, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    videos = [made(seed, arguments.seconds) for seed in range(arguments.videos)]
    settings = {
        "stride": Cut(by="stride", sound="drop"),
        "scenes": Cut(by="scenes", sound="drop"),
        "scenes and sound": Cut(by="scenes", sound="keep"),
    }
    rounds: dict[str, list[float]] = {name: [] for name in ("bare loop", *settings)}
    for _ in range(arguments.rounds):  # in turns, so that a busy machine slows all of them
        rounds["bare loop"].append(per_clip(lambda data: bare(data, Cut()), videos))
        for name, cut in settings.items():
            rounds[name].append(per_clip(lambda data, cut=cut: whole(data, cut), videos))
    base = statistics.median(rounds["bare loop"])
    for name, values in rounds.items():
        median = statistics.median(values)
        print(f"{name:18} {1000 * median:7.1f} CPU ms per second of clip, {median / base:.2f} × the bare loop")


def per_clip(run, videos: list[bytes]) -> float:
    """CPU seconds per second of clips."""
    start, seconds = time.process_time(), 0.0
    for data in videos:
        seconds += run(data)
    return (time.process_time() - start) / seconds


def whole(data: bytes, cut: Cut) -> float:
    """Cut a video; return the seconds of its clips."""
    result = cut_file(data, cut, 95)
    assert isinstance(result, CutFile), result
    return sum(clip.frames for clip in result.clips) / cut.fps


def bare(data: bytes, cut: Cut) -> float:
    """Do the same with PyAV alone, every longest length; return the seconds of the clips."""
    width, height = round(WIDTH * cut.size / HEIGHT) // 2 * 2, cut.size
    longest, seconds, number, writer = round(cut.seconds[1] * cut.fps), 0.0, 0, None
    with av.open(io.BytesIO(data)) as file:
        stream = file.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in file.decode(stream):
            while number / cut.fps <= frame.time:
                if writer is None:
                    buffer = io.BytesIO()
                    writer = av.open(buffer, "w", format="mp4")
                    out = writer.add_stream("libx264", rate=cut.fps)
                    out.width, out.height, out.pix_fmt = width, height, "yuv420p"
                    out.codec_context.thread_count = 1
                    out.codec_context.gop_size = cut.fps
                    out.codec_context.options = {
                        "crf": str(cut.crf),
                        "preset": "veryfast",
                        "x264-params": "threads=1:mbtree=0",
                    }
                    frames = 0
                small = frame.reformat(width, height, "yuv420p", threads=1)
                small.pts, small.time_base = frames, Fraction(1, cut.fps)
                writer.mux(out.encode(small))
                frames, number = frames + 1, number + 1
                if frames == longest:
                    seconds += closed(writer, out, frames, cut)
                    writer = None
    return seconds + (closed(writer, out, frames, cut) if writer is not None else 0.0)


def closed(writer, out, frames: int, cut: Cut) -> float:
    writer.mux(out.encode(None))
    writer.close()
    return frames / cut.fps


def made(seed: int, seconds: float) -> bytes:
    """A video of pictures that pan, with a cut every three to six seconds, and a sound."""
    random = np.random.default_rng(seed)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=FPS, options={"crf": "23", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        sound = file.add_stream("aac", rate=44_100, layout="stereo")
        left = 0
        for number in range(round(seconds * FPS)):
            if not left:
                picture, left = still(random), int(random.integers(3 * FPS, 6 * FPS))
            left -= 1
            pixels = np.ascontiguousarray(np.roll(picture, 3 * left, axis=1)[:, :WIDTH])
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        for start in range(0, round(seconds * 44_100), 1024):
            wave = np.sin(2 * np.pi * 330 * (start + np.arange(1024)) / 44_100) * 9000
            block = np.repeat(wave.astype(np.int16)[:, None], 2, axis=1).reshape(1, -1)
            heard = av.AudioFrame.from_ndarray(block, "s16", "stereo")
            heard.sample_rate, heard.pts, heard.time_base = 44_100, start, Fraction(1, 44_100)
            file.mux(sound.encode(heard))
        file.mux(sound.encode(None))
    return buffer.getvalue()


def still(random: np.random.Generator) -> np.ndarray:
    """A picture with detail at several scales."""
    total = np.zeros((HEIGHT, 2 * WIDTH, 3))
    for cells in (4, 16, 64):
        noise = random.random((cells, 2 * cells, 3))
        total += cv2.resize(noise, (2 * WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC) / np.sqrt(cells)
    total -= total.min()
    return (255 * total / total.max()).astype(np.uint8)


if __name__ == "__main__":
    main()
