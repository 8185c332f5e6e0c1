"""Small videos and sounds for tests, made on the spot."""

import io
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np

RED, GREEN, BLUE, WHITE, GREY = (200, 30, 30), (30, 160, 40), (30, 60, 200), (255, 255, 255), (128, 128, 128)
Colour = tuple[int, int, int]


def plain(colour: Colour, width: int = 96, height: int = 64) -> np.ndarray:
    """A frame of one colour."""
    return np.full((height, width, 3), colour, np.uint8)


def seconds_of(
    colours: Sequence[Colour], fps: int = 8, each: float = 2.5, size: tuple[int, int] = (96, 64)
) -> list[Any]:
    """Frames that show each colour for `each` seconds."""
    return [plain(colour, *size) for colour in colours for _ in range(round(each * fps))]


def tone(seconds: float, rate: int = 8000, hertz: float = 440.0, channels: int = 1, level: int = 8000) -> np.ndarray:
    """A sine (int16 [samples, channels])."""
    wave = level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.repeat(np.rint(wave).astype(np.int16)[:, None], channels, axis=1)


def movie(
    frames: Sequence[np.ndarray] = (),
    *,
    fps: int = 8,
    form: str = "mp4",
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    times: Sequence[float] | None = None,
    sound: np.ndarray | None = None,
    sound_codec: str = "flac",
    rate: int = 8000,
    sound_from: float = 0.0,
    options: Mapping[str, str] | None = None,
    container: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    rotation: int = 0,
    ratio: Fraction | None = None,
    colours: Mapping[str, int] | None = None,
    repeat_stream: bool = False,
) -> bytes:
    """A file of these frames (uint8 RGB, or uint16 for HDR), shown at `times` (else 1/fps apart), and of a sound."""
    out = io.BytesIO()
    with av.open(out, "w", format=form, container_options=dict(container or {})) as file:
        file.metadata.update(metadata or {})
        streams = []
        for _ in range((2 if repeat_stream else 1) if len(frames) else 0):
            stream = file.add_stream(codec, rate=fps, options=dict(options or {}))
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = pixel_format
            stream.codec_context.thread_count = 1
            if times is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            if ratio is not None:
                stream.codec_context.sample_aspect_ratio = ratio
            for name, value in (colours or {}).items():
                setattr(stream.codec_context, name, value)
            if rotation:
                stream.set_display_rotation(rotation)
            streams.append(stream)
        heard = None
        if sound is not None:
            heard = file.add_stream(sound_codec, rate=rate)
            heard.codec_context.layout = "stereo" if sound.shape[1] == 2 else "mono"
            heard.codec_context.thread_count = 1
        for stream in streams:
            for number, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb48le" if pixels.dtype == np.uint16 else "rgb24")
                matrix = (colours or {}).get("colorspace")
                if matrix is not None:
                    frame = frame.reformat(format=pixel_format, dst_colorspace=matrix)
                if times is None:
                    frame.pts, frame.time_base = number, Fraction(1, fps)
                else:
                    frame.pts, frame.time_base = round(times[number] * 1000), Fraction(1, 1000)
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
        if heard is not None and sound is not None:
            _write_sound(file, heard, sound, rate, sound_from)
    return out.getvalue()


def _write_sound(file: Any, stream: Any, sound: np.ndarray, rate: int, start_s: float) -> None:
    layout = "stereo" if sound.shape[1] == 2 else "mono"
    resampler = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate, frame_size=1024)
    for start in range(0, len(sound), 1024):
        block = np.ascontiguousarray(sound[start : start + 1024]).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(block, "s16", layout)
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        frame.pts = round(start_s * rate) + start
        for part in resampler.resample(frame):
            file.mux(stream.encode(part))
    for part in resampler.resample(None):
        file.mux(stream.encode(part))
    file.mux(stream.encode(None))


def sound_file(sound: np.ndarray, form: str, codec: str, rate: int = 8000) -> bytes:
    """A file of sound alone."""
    return movie(form=form, sound_codec=codec, sound=sound, rate=rate)


def shown(mp4: bytes) -> list[np.ndarray]:
    """All frames of a clip as RGB."""
    with av.open(io.BytesIO(mp4)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def middle(pixels: np.ndarray) -> list[int]:
    """The colour in the middle of an image."""
    return [int(value) for value in pixels[pixels.shape[0] // 2, pixels.shape[1] // 2]]


def hugging_face_clips(tars: Sequence[str], cache: str, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The samples of tars of clips by Hugging Face's reader, with video and sound as bytes: it needs no torchcodec.

    `fields` is the content of one KEY.json.
    """
    import datasets

    kinds = {str: "string", int: "int64", float: "float64"}
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("__key__", "__url__", "txt")}
        | {name: datasets.Value("binary") for name in ("mp4", "flac")}
        | {"jpg": datasets.Image(), "json": {name: datasets.Value(kinds[type(v)]) for name, v in fields.items()}}
    )
    read = datasets.load_dataset("webdataset", data_files=list(tars), split="train", features=features, cache_dir=cache)
    return list(read)


def write_clips(folder: Any) -> Any:
    """Cut and build two videos, red then green, the second with a sound; return the dataset's folder."""
    from capstan.pipeline.build import build
    from capstan.pipeline.clips.cut import cut
    from capstan.pipeline.config import Recipe

    (folder / "in").mkdir()
    for number, sound in enumerate([None, tone(3.0)]):
        frames = [plain(RED)] * 12 + [plain(GREEN)] * 12
        for place, frame in enumerate(frames):
            frames[place] = frame.copy()
            frames[place][8 + 8 * number : 16 + 8 * number, 3 * place : 3 * place + 8] = WHITE
        (folder / f"in/{number}.mkv").write_bytes(movie(frames, sound=sound, form="matroska"))
        (folder / f"in/{number}.txt").write_text(f"video {number}")
    shared = {"resources": {"cpus": 1}}
    settings = {"by": "none", "fps": 8, "size": 64, "min_size": 16}
    cut(
        Recipe.model_validate(
            {"dataset": str(folder / "clips"), "source": {"path": str(folder / "in")}, "cut": settings} | shared
        ),
        progress=False,
    )
    source = {"path": str(folder / "clips/shards/*.tar"), "parts": ["mp4", "flac"]}
    made = {"dataset": str(folder / "ds"), "source": source, "image": {"resize": "none", "min_size": 16}}
    made |= {"dedup": {"exact": False, "perceptual": None}}
    assert build(Recipe.model_validate(made | shared), progress=False)["counts"]["kept"] == 2
    return folder / "ds"
