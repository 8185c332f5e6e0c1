"""Captions → token ids: CLIP's byte-level BPE, or one trained on the captions

A folder holds the tokenizer in two formats with the same ids:

    vocab.json merges.txt tokenizer_config.json special_tokens_map.json    transformers.CLIPTokenizer
    bpe.txt.gz                                                             open_clip.tokenizer.SimpleTokenizer

Ids: 256 bytes, 256 bytes that end a word, one id per merge, then start and end of text (Radford et al. 2021, CLIP).
"""

from __future__ import annotations

import gzip
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from capstan.pipeline.errors import RecipeError

if TYPE_CHECKING:
    import tokenizers

START: Final = "<|startoftext|>"
END: Final = "<|endoftext|>"
END_OF_WORD: Final = "</w>"
BPE_FILE: Final = "bpe.txt.gz"
_HEADER: Final = "#version: 0.2"
_SPLIT: Final = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
_CLIP_MERGES: Final = 49152 - 256 - 2  # number of merges that CLIP uses of its file
SMALLEST: Final = 2 * 256 + 2  # size of a vocabulary without merges


class Tokenizer:
    """Text → ids. `pad` is the end-of-text id, as CLIP's text encoders expect; open_clip's CoCa pads with 0."""

    def __init__(self, merges: Sequence[tuple[str, str]]) -> None:
        self.merges = list(merges)
        self.vocab = _vocabulary(self.merges)
        self.vocab_size = len(self.vocab)
        self.start, self.end = self.vocab[START], self.vocab[END]
        self.pad = self.end
        self._backend = _backend(self.vocab, self.merges)
        self._tokens = {index: token for token, index in self.vocab.items()}
        self._bytes = {letter: byte for byte, letter in _letters().items()}

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from `captions`: at most `vocab_size` ids, fewer if the captions have no more merges."""
        from tokenizers.trainers import BpeTrainer

        if vocab_size < SMALLEST:
            raise RecipeError("vocab_size", f"{vocab_size} is too small", f"use at least {SMALLEST}")
        backend = _backend(None, None)
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=list(_vocabulary([]))[:-2],  # fixes the order of letters, which breaks ties in the trainer
            end_of_word_suffix=END_OF_WORD,
        )
        backend.train_from_iterator((clean(caption) for caption in captions), trainer)
        learnt = [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
        return cls(_without_duplicates(learnt)[: vocab_size - SMALLEST])

    @classmethod
    def clip(cls) -> Tokenizer:
        """Return CLIP's own vocabulary of 49408 ids, from the file in open_clip's package."""
        from importlib.util import find_spec

        spec = find_spec("open_clip")
        assert spec is not None, "open_clip is a declared dependency"
        assert spec.origin is not None
        return cls(_read_merges(Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz"))[:_CLIP_MERGES])

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read what `save` wrote."""
        return cls(_read_merges(folder / BPE_FILE))

    def save(self, folder: Path) -> None:
        """Write both formats into `folder`, created if missing."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = "\n".join([_HEADER, *(f"{left} {right}" for left, right in self.merges)])
        (folder / BPE_FILE).write_bytes(
            gzip.compress(lines.encode(), mtime=0)
        )  # no final newline: it would count as a merge
        (folder / "merges.txt").write_text(lines + "\n", encoding="utf-8")
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
        for name, content in (
            ("vocab.json", self.vocab),
            ("tokenizer_config.json", config),
            ("special_tokens_map.json", special),
        ):
            (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=None), encoding="utf-8")

    def ids(self, text: str) -> list[int]:
        """Return the ids of `text`, without start and end."""
        return list(self._backend.encode(clean(text), add_special_tokens=False).ids)

    def encode(self, texts: Sequence[str], length: int, *, pad: int | None = None) -> torch.Tensor:
        """Return LongTensor [B, length]: start, ids, end, padding. A long text is cut but still ends with end."""
        out = torch.full((len(texts), length), self.pad if pad is None else pad, dtype=torch.long)
        for row, text in enumerate(texts):
            ids = [self.start, *self.ids(text)[: length - 2], self.end]
            out[row, : len(ids)] = torch.tensor(ids)
        return out

    def decode(self, ids: Iterable[int]) -> str:
        """Return the lower-case text of `ids` up to the first end, without start and unknown ids."""
        letters = ""
        for index in ids:
            if int(index) == self.end:
                break
            token = self._tokens.get(int(index), "")
            letters += "" if token == START else token.replace(END_OF_WORD, " ")
        raw = b"".join(b" " if letter == " " else bytes([self._bytes[letter]]) for letter in letters)
        return raw.decode("utf-8", errors="replace").strip()


def clean(text: str) -> str:
    """Return the normalised text, by open_clip's rules: mojibake and HTML entities fixed, single spaces, lower case."""
    import ftfy

    fixed = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(fixed.split()).lower()


def _letters() -> dict[int, str]:
    """Return byte → printable letter (GPT-2's table), in CLIP's order of ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    letters = list(_letters().values())
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters), *(a + b for a, b in merges), START, END]
    return {token: index for index, token in enumerate(tokens)}


def _without_duplicates(merges: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Remove merges that produce the token of an earlier merge: open_clip would assign it two ids."""
    first: dict[str, tuple[str, str]] = {}
    for left, right in merges:
        first.setdefault(left + right, (left, right))
    return list(first.values())


def _read_merges(path: Path) -> list[tuple[str, str]]:
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1:]
    pairs = [tuple(line.split()) for line in lines if line]
    return [(left, right) for left, right in pairs]


def _backend(vocab: dict[str, int] | None, merges: list[tuple[str, str]] | None) -> tokenizers.Tokenizer:
    """Return the normaliser, splitter and BPE of transformers' CLIPTokenizer."""
    import tokenizers
    from tokenizers import Regex, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    model: Any = (
        BPE(end_of_word_suffix=END_OF_WORD)
        if vocab is None
        else BPE(vocab=vocab, merges=merges, end_of_word_suffix=END_OF_WORD, unk_token=END)
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return backend
