"""The contract for moving images: about fifty odd and hostile files, each with its right outcome."""

import io
import itertools
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from moving import BLUE, GREEN, GREY, RED, WHITE, middle, movie, plain, seconds_of, shown, sound_file, tone
from PIL import Image

from capstan.pipeline.clips.clip import CutFile, cut_file
from capstan.pipeline.config.cut import Cut
from capstan.pipeline.image.decode import Failure
from capstan.pipeline.media.codec import decode_flac

FPS = 8
THREE = seconds_of([RED, GREEN, BLUE])  # 7.5 s
SHORT = seconds_of([RED], each=3.0)


def cut(data: bytes, **settings: Any) -> CutFile | Failure:
    return cut_file(data, Cut.model_validate({"fps": FPS, "min_size": 16, "size": 64} | settings), 95)


def clips(data: bytes, **settings: Any) -> CutFile:
    result = cut(data, **settings)
    assert isinstance(result, CutFile), result
    return result


def near(found: Any, colour: Any, most: int = 6) -> bool:
    return bool(np.abs(np.asarray(found, int) - np.asarray(colour, int)).max() <= most)


# What is cut ----------------------------------------------------------------------------------------------------------


def test_scenes_end_where_the_picture_changes() -> None:
    found = clips(movie(THREE)).clips
    assert [(clip.start, clip.frames) for clip in found] == [(0, 20), (20, 20), (40, 20)]
    for clip, colour in zip(found, (RED, GREEN, BLUE), strict=True):
        frames = shown(clip.mp4)
        assert len(frames) == clip.frames
        assert all(near(middle(frame), colour) for frame in frames), "a clip starts and ends in its own scene"
        assert near(middle(np.asarray(Image.open(io.BytesIO(clip.jpg)))), colour)


def test_a_stride_ends_clips_at_the_longest_length_and_drops_a_short_rest() -> None:
    found = clips(movie(THREE), by="stride", seconds=[2, 3]).clips
    assert [(clip.start, clip.frames) for clip in found] == [(0, 24), (24, 24)]
    found = clips(movie(THREE), by="stride", seconds=[1, 3]).clips
    assert [clip.frames for clip in found] == [24, 24, 12]


def test_a_whole_video_is_one_clip_or_too_long() -> None:
    (clip,) = clips(movie(THREE), by="none").clips
    assert clip.frames == 60
    assert cut(movie(THREE), by="none", seconds=[2, 5]) == Failure("too_long", "more than 5 s, and cut.by is none")


def test_fast_motion_is_no_cut() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    moving = [np.roll(noise, 9 * number, axis=1) for number in range(40)]
    assert len(clips(movie(moving)).clips) == 1


def test_clips_have_a_constant_rate_whole_frames_first_and_one_key_frame_a_second() -> None:
    (clip,) = clips(movie(SHORT)).clips
    with av.open(io.BytesIO(clip.mp4)) as file:
        stream = file.streams.video[0]
        assert stream.average_rate == FPS
        frames = list(file.decode(stream))
    assert [frame.pts * frame.time_base for frame in frames] == [Fraction(n, FPS) for n in range(24)]
    assert [number for number, frame in enumerate(frames) if frame.key_frame] == [0, 8, 16]


def test_the_same_file_gives_the_same_bytes() -> None:
    rng = np.random.default_rng(1)
    noisy = [rng.integers(0, 255, (66, 86, 3), dtype=np.uint8) for _ in range(24)]
    data = movie(noisy, sound=tone(3.0), form="matroska")
    first = clips(data)
    for _ in range(3):
        assert clips(data) == first


def test_full_colours_lose_less() -> None:
    sharp = plain(WHITE)
    sharp[:, ::2] = RED
    data = movie([sharp] * 24, pixel_format="yuv444p", options={"crf": "1"})

    def error(**settings: Any) -> float:
        (clip,) = clips(data, **settings).clips
        return float(np.square(shown(clip.mp4)[3].astype(float) - sharp).mean())

    assert error(chroma="444", crf=10) * 20 < error(chroma="420", crf=10)


# Odd files that are read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "codec"),
    [
        *(("mp4", "libx264"), ("mov", "libx264"), ("matroska", "libx264"), ("webm", "libvpx-vp9"), ("mp4", "mpeg4")),
        *(("mov", "prores_ks"), ("mp4", "libx265"), ("matroska", "ffv1"), ("mp4", "libsvtav1")),
    ],
)
def test_containers_and_codecs(form: str, codec: str) -> None:
    form_of_pixels = {"prores_ks": "yuv422p10le"}.get(codec, "yuv420p")
    options = {"libx265": {"x265-params": "log-level=none"}}.get(codec, {})
    found = clips(movie(SHORT, form=form, codec=codec, pixel_format=form_of_pixels, options=options))
    assert [clip.frames for clip in found.clips] == [24]
    assert near(middle(shown(found.clips[0].mp4)[5]), RED, 10)
    assert (found.facts.width, found.facts.height) == (96, 64)


def test_a_fragmented_file() -> None:
    data = movie(SHORT, container={"movflags": "frag_keyframe+empty_moov"})
    assert [clip.frames for clip in clips(data).clips] == [24]


def test_frames_are_shown_by_their_time_stamps() -> None:
    """Variable rate: red for two seconds, then green for one in many frames, then blue once."""
    times = [0.0, *(2 + number / 30 for number in range(30)), 3.0, 4.0]
    frames = [plain(RED), *[plain(GREEN)] * 30, plain(BLUE), plain(BLUE)]
    (clip,) = clips(movie(frames, times=times, form="matroska"), by="none").clips
    found = [middle(frame) for frame in shown(clip.mp4)]
    assert all(near(colour, RED, 10) for colour in found[:16])
    assert all(near(colour, GREEN, 10) for colour in found[16:24])
    assert all(near(colour, BLUE, 10) for colour in found[24:])
    assert 32 <= clip.frames <= 34


def test_time_starts_with_the_first_frame() -> None:
    data = movie(SHORT, times=[10 + number / FPS for number in range(24)], form="matroska")
    (clip,) = clips(data).clips
    assert (clip.start, clip.frames) == (0, 24)


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_phone_s_rotation_is_applied(turn: int) -> None:
    frame = plain(GREY)
    frame[:16, :16] = RED  # top left as it is stored
    found = clips(movie([frame] * 24, rotation=turn))
    (clip,) = found.clips
    first = shown(clip.mp4)[0]
    assert first.shape[:2] == ((64, 96) if turn == 180 else (96, 64))
    corner = {90: first[-6, 6], 180: first[-6, -6], 270: first[6, -6]}[turn]
    assert near(corner, RED, 25)
    assert (found.facts.width, found.facts.height) == ((96, 64) if turn == 180 else (64, 96))


def test_pixels_that_are_not_square_are_made_so() -> None:
    (clip,) = clips(movie(SHORT, ratio=Fraction(2, 1))).clips
    assert (clip.width, clip.height) == (192, 64)


def test_odd_sizes_become_even_and_nothing_is_enlarged() -> None:
    (clip,) = clips(movie([plain(RED, 101, 75)] * 24, pixel_format="yuv444p"), size=256).clips
    assert (clip.width, clip.height) == (100, 74)


def test_ten_bits_keep_their_colour() -> None:
    data = movie(SHORT, codec="libx265", pixel_format="yuv420p10le", options={"x265-params": "log-level=none"})
    assert near(middle(shown(clips(data).clips[0].mp4)[3]), RED)


@pytest.mark.parametrize(("colorspace", "number"), [("bt709", 1), ("bt601", 5)])
def test_the_matrix_that_the_file_states_is_used(colorspace: str, number: int) -> None:
    data = movie(SHORT, colours={"colorspace": number})
    assert near(middle(shown(clips(data).clips[0].mp4)[3]), RED), colorspace


def test_full_range_keeps_its_colour() -> None:
    data = movie(SHORT, pixel_format="yuvj420p")
    assert near(middle(shown(clips(data).clips[0].mp4)[3]), RED)


@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_is_mapped_and_white_is_not_clipped(transfer: int) -> None:
    """Steps of brightness stay apart and in order, up to what is far brighter than white."""
    codes = [0.2, 0.4, 0.5, 0.58, 0.7, 0.8]
    frame = np.zeros((64, 96, 3), np.uint16)
    for number, code in enumerate(codes):
        frame[:, 16 * number : 16 * (number + 1)] = round(code * 65535)
    data = movie(
        [frame] * 24,
        codec="libx265",
        pixel_format="yuv420p10le",
        options={"x265-params": "log-level=none:qp=1"},
        colours={"colorspace": 9, "color_primaries": 9, "color_trc": transfer},
    )
    row = shown(clips(data, crf=1).clips[0].mp4)[3][32, 8::16, 1].astype(int)
    assert all(a + 6 < b for a, b in itertools.pairwise(row)), row
    assert row[-1] <= 255
    assert row[0] < 110


def test_metadata_is_left_behind() -> None:
    data = movie(SHORT, metadata={"title": "SECRETTITLE", "location": "+48.2+016.3/", "comment": "SECRETTITLE"})
    assert b"SECRETTITLE" in data
    (clip,) = clips(data).clips
    assert b"SECRET" not in clip.mp4 + clip.jpg
    assert b"+48.2" not in clip.mp4


def test_the_first_of_two_video_streams_is_read() -> None:
    assert [clip.frames for clip in clips(movie(SHORT, repeat_stream=True)).clips] == [24]


# Sound ----------------------------------------------------------------------------------------------------------------


def test_each_clip_has_the_sound_of_its_time() -> None:
    sound = np.concatenate([tone(2.5, hertz=hertz) for hertz in (300, 600, 1200)])
    found = clips(movie(THREE, sound=sound, form="matroska")).clips
    for clip, hertz in zip(found, (300, 600, 1200), strict=True):
        samples, rate = decode_flac(clip.flac)
        assert (len(samples), rate, clip.sample_rate, clip.channels) == (20_000, 8000, 8000, 1)
        spectrum = np.abs(np.fft.rfft(samples[:, 0]))
        assert abs(spectrum.argmax() * rate / len(samples) - hertz) < 2
    assert np.array_equal(decode_flac(found[0].flac)[0], sound[:20_000]), "FLAC loses nothing, nothing is shifted"


def test_sound_that_starts_late_or_ends_early_is_filled_with_silence() -> None:
    (clip,) = clips(movie(SHORT, sound=tone(1.0), sound_from=1.0, form="matroska")).clips
    samples, _ = decode_flac(clip.flac)
    assert len(samples) == 24_000
    assert not samples[:7900].any()
    assert np.abs(samples[8100:15900]).max() > 7000
    assert not samples[16_100:].any()


def test_sound_that_is_dropped() -> None:
    (clip,) = clips(movie(SHORT, sound=tone(3.0), form="matroska"), sound="drop").clips
    assert (clip.flac, clip.sample_rate, clip.channels) == (b"", 0, 0)


def test_a_video_without_sound_is_silent_and_says_so() -> None:
    (clip,) = clips(movie(SHORT)).clips
    samples, rate = decode_flac(clip.flac)
    assert (len(samples) / rate, samples.any(), clip.sample_rate, clip.channels) == (3.0, False, 0, 0)


@pytest.mark.parametrize(
    ("form", "codec", "rate"),
    [("wav", "pcm_s16le", 8000), ("flac", "flac", 44_100), ("mp3", "libmp3lame", 16_000), ("ogg", "libopus", 48_000)],
)
def test_files_of_sound_alone(form: str, codec: str, rate: int) -> None:
    data = sound_file(tone(3.0, rate, channels=2), form, codec, rate)
    (clip,) = clips(data, sound="only").clips
    samples, found = decode_flac(clip.flac)
    assert (found, clip.channels, clip.mp4) == (rate, 2, b"")
    assert abs(len(samples) / rate - 3) < 0.1
    picture = np.asarray(Image.open(io.BytesIO(clip.jpg)))
    assert picture.shape[:2] == (clip.height, clip.width)
    bright = picture[..., 0].mean(axis=1).argmax()
    expected = 128 * (1 - np.log(440 / 40) / np.log(rate / 2 / 40))
    assert abs(bright - expected) < 3, "the tone is a line of the spectrogram"


def test_sound_is_resampled_if_the_recipe_says_so() -> None:
    data = sound_file(tone(3.0, 44_100, channels=2), "flac", "flac", 44_100)
    (clip,) = clips(data, sound="only", sample_rate=16_000).clips
    samples, rate = decode_flac(clip.flac)
    assert (rate, clip.sample_rate, round(len(samples) / rate, 2)) == (16_000, 16_000, 3.0)


# Files that are refused -----------------------------------------------------------------------------------------------


def faststart() -> bytes:
    """A file whose index comes first, as sites send it."""
    plain_file = movie(THREE, options={"crf": "1"})
    at = plain_file.index(b"moov") - 4
    moov = plain_file[at:]
    head = plain_file.index(b"mdat") - 4
    body = plain_file[head:at]
    shifted = bytearray(moov)
    where = shifted.index(b"stco") + 8
    for number in range(int.from_bytes(shifted[where : where + 4])):
        place = where + 4 + 4 * number
        shifted[place : place + 4] = (int.from_bytes(shifted[place : place + 4]) + len(moov)).to_bytes(4)
    return plain_file[:head] + bytes(shifted) + body


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(plain(RED)).save(buffer, "JPEG")
    return buffer.getvalue()


def gif() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(plain(RED)).save(buffer, "GIF", save_all=True, append_images=[Image.fromarray(plain(BLUE))] * 5)
    return buffer.getvalue()


def damaged() -> bytes:
    rng = np.random.default_rng(0)
    data = bytearray(movie([rng.integers(0, 255, (64, 96, 3), dtype=np.uint8) for _ in range(40)]))
    for place in range(len(data) // 3, len(data) // 2, 97):
        data[place] ^= 0x55
    return bytes(data)


def longer_than_it_is() -> bytes:
    """A recording whose header says 7.5 s, and whose segment of unknown size ends after about three."""
    data = bytearray(movie(THREE, form="matroska", options={"crf": "1", "g": "8"}))
    at = data.index(b"\x18\x53\x80\x67") + 4
    data[at : at + 8] = b"\x01" + b"\xff" * 7
    return bytes(data[: len(data) * 2 // 5])


ENCRYPTED = {
    "encryption_scheme": "cenc-aes-ctr",
    "encryption_key": "76a6c65c5ea762046bd749a2e632ccbb",
    "encryption_kid": "a7e61c373e219033c21091fa607bf3b8",
}


def song_with_cover() -> bytes:
    """An ID3 tag with a picture, then a song."""
    picture = jpeg()
    body = b"\x00image/jpeg\x00\x03\x00" + picture
    frame = b"APIC" + len(body).to_bytes(4) + b"\x00\x00" + body
    size = bytes((len(frame) >> shift) & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x03\x00\x00" + size + frame + sound_file(tone(3.0, 16_000), "mp3", "libmp3lame", 16_000)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a page": (lambda: b"<!doctype html><title>404</title>" * 9, {}, "no_video"),
    "an image": (jpeg, {}, "no_video"),
    "an animation": (gif, {}, "no_video"),
    "noise": (lambda: bytes(np.random.default_rng(3).integers(1, 255, 5000, dtype=np.uint8)), {}, "no_video"),
    "a few bytes": (lambda: b"\x00\x00", {}, "no_video"),
    "a still image in a video's container": (lambda: b"\x00\x00\x00\x1cftypavif" + bytes(200), {}, "no_video"),
    "sound alone": (lambda: movie(sound=tone(3.0), form="mp4"), {}, "no_video"),
    "a song with a cover": (song_with_cover, {}, "no_video"),
    "no sound": (lambda: movie(SHORT), {"sound": "only"}, "no_sound"),
    "AVI": (lambda: movie(SHORT, form="avi", codec="mpeg4"), {}, "unsupported"),
    "a transport stream": (lambda: movie(SHORT, form="mpegts"), {}, "unsupported"),
    "Flash": (lambda: movie(SHORT, form="flv"), {}, "unsupported"),
    "a playlist": (lambda: b"#EXTM3U\n#EXTINF:3,\nfile:///etc/passwd\n", {}, "unsupported"),
    "a rare codec": (lambda: movie(SHORT, form="matroska", codec="rawvideo"), {}, "unsupported"),
    "encrypted": (lambda: movie(SHORT, container=ENCRYPTED), {}, "unsupported"),
    "no index": (lambda: movie(THREE)[:-900], {}, "truncated"),
    "index first, cut": (lambda: faststart()[:-2000], {}, "truncated"),
    "Matroska, cut": (lambda: movie(THREE, form="matroska")[:-300], {}, "truncated"),
    "a recording that stops": (longer_than_it_is, {}, "truncated"),
    "a header alone": (lambda: movie(THREE, form="matroska")[:60], {}, "truncated"),
    "WAV, cut": (lambda: sound_file(tone(3.0), "wav", "pcm_s16le")[:-400], {"sound": "only"}, "truncated"),
    "damage": (damaged, {}, "corrupt"),
    "a box that ends before it starts": (lambda: b"\x00\x00\x00\x04ftyp" + bytes(range(1, 200)), {}, "corrupt"),
    "too short": (lambda: movie(seconds_of([RED], each=1.0)), {}, "no_clip"),
    "scenes that are all too short": (lambda: movie(seconds_of([RED, BLUE, GREEN], each=1.0)), {}, "no_clip"),
    "too long": (lambda: movie(THREE), {"max_seconds": 5}, "too_long"),
    "too long by one time stamp": (
        lambda: movie([plain(RED)] * 3, times=[0, 1, 9999], form="matroska"),
        {},
        "too_long",
    ),
    "too many frames": (lambda: movie(THREE), {"max_frames": 50}, "too_long"),
    "sound that is too long": (
        lambda: sound_file(tone(9.0), "wav", "pcm_s16le"),
        {"sound": "only", "max_seconds": 5},
        "too_long",
    ),
    "too many pixels": (lambda: movie(SHORT), {"max_pixels": 96 * 64 - 1}, "too_many_pixels"),
    "too small": (lambda: movie(SHORT), {"min_size": 65}, "too_small"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(name: str) -> None:
    make, settings, reason = REFUSED[name]
    result = cut(make(), **settings)
    assert isinstance(result, Failure), f"{name}: {[c.frames for c in result.clips]} frames"
    assert result.reason == reason, result


def test_faststart_itself_is_read() -> None:
    assert len(clips(faststart()).clips) == 3
