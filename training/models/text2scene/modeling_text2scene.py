"""Text → a scene, thing by thing (Tan et al. 2019); this file travels with the weights and needs no Capstan

    model = AutoModel.from_pretrained(DIR, trust_remote_code=True)
    scene = model.compose(["a red circle left of a blue square"])[0]     {"background": …, "objects": [{label, box, …}]}
    model.picture(scene).save("scene.png"), model.svg(scene)

Text2Scene (arXiv:1809.01110, section 3), at step t:

    h^E        words → bidirectional GRU
    h^D_t      the canvas with all things so far → convolutions → convolutional GRU
    p(o_t)     which thing, or the end          from the canvas, o_{t−1} and attention to the words, α^o_t
    p(R_t)     its attributes and its size      from o_t and attention of its own, α^a_t
    p(l_t)     its place on a grid              from the canvas, o_t and its attributes

Shapes: B scenes, T steps, L words, K attributes, C channels, c × c cells, g × g places. Boxes are (left, top, right,
bottom), and the sides of the canvas are 1.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

Scene = dict[str, Any]
Thing = dict[str, Any]

_PAD, _UNKNOWN = 0, 1  # ids of words
PARTS = (".png", ".jpeg", ".webp")  # suffixes of the files in `parts/`
END = 0  # id of the label that ends a scene
_EMPTY, _OTHER = (240, 240, 240), (150, 150, 150)  # a canvas and a thing without a known colour


def words_of(text: str) -> list[str]:
    """Return the words of a text, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


class Text2SceneConfig(PretrainedConfig):  # type: ignore[misc,unused-ignore]
    """Vocabularies and sizes. `attributes`: name → values; `outlines`: label → corners in the unit circle.

    `background` is the label of a thing that is the canvas; `ink` the attribute that things are painted in.
    """

    model_type = "text2scene"

    def __init__(
        self,
        words: Sequence[str] = (),
        labels: Sequence[str] = (),
        attributes: Mapping[str, Sequence[str]] | None = None,
        background: str | None = None,
        ink: str = "colour",
        length: int = 64,
        width: int = 64,
        heads: int = 4,
        cells: int = 8,
        grid: int = 32,
        sizes: int = 24,
        most: int = 8,
        side: int = 256,
        palette: Mapping[str, Sequence[int]] | None = None,
        outlines: Mapping[str, Sequence[Sequence[float]]] | None = None,
        **others: Any,
    ) -> None:
        self.words, self.labels = list(words), list(labels)
        self.attributes = {name: list(values) for name, values in (attributes or {}).items()}
        self.background, self.ink = background, ink
        self.length, self.width, self.heads = length, width, heads
        self.cells, self.grid, self.sizes, self.most = cells, grid, sizes, most
        self.side, self.palette, self.outlines = side, dict(palette or {}), dict(outlines or {})
        super().__init__(**others)

    def ids(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the ids [B, L] of the words of texts, cut and padded to `length`."""
        known = {word: number for number, word in enumerate(self.words, start=2)}
        ids = torch.full((len(texts), self.length), _PAD)
        for row, text in enumerate(texts):
            found = [known.get(word, _UNKNOWN) for word in words_of(text)][: self.length] or [_UNKNOWN]
            ids[row, : len(found)] = torch.tensor(found)
        return ids


@dataclass
class Steps:
    """What all steps say: logits of each decision, and where they looked. Lists have one entry per step."""

    labels: list[torch.Tensor]  # [B, labels + 1]
    attributes: list[list[torch.Tensor]]  # K of [B, values]
    sizes: list[list[torch.Tensor]]  # width, height: [B, sizes]
    places: list[torch.Tensor]  # [B, g²]
    on_objects: list[torch.Tensor]  # α^o [B, L]
    on_attributes: list[torch.Tensor]  # α^a [B, L]


class Attention(nn.Module):
    """Attention of one query to words, with several heads; returns what was read and the mean weights."""

    def __init__(self, query: int, memory: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.query = heads, nn.Linear(query, width)
        self.keys, self.values = nn.Linear(memory, width), nn.Linear(memory, width)

    def forward(
        self, query: torch.Tensor, memory: torch.Tensor, there: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count, length = memory.shape[:2]
        asked = self.query(query).view(count, self.heads, 1, -1)
        keys, values = (
            part(memory).view(count, length, self.heads, -1).transpose(1, 2) for part in (self.keys, self.values)
        )
        scores = (asked * keys).sum(-1) / keys.shape[-1] ** 0.5
        weights = scores.masked_fill(~there[:, None], -1e9).softmax(-1)
        return (weights[..., None] * values).sum(2).flatten(1), weights.mean(1)


class ConvGRU(nn.Module):
    """A GRU whose state is a map (Ballas et al. 2016)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gates = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.fresh = nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(self, seen: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        update, reset = self.gates(torch.cat([seen, state], 1)).sigmoid().chunk(2, 1)
        fresh = self.fresh(torch.cat([seen, reset * state], 1)).tanh()
        mixed: torch.Tensor = (1 - update) * state + update * fresh
        return mixed


def _mlp(wide: int, width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(wide, 2 * width), nn.ReLU(), nn.Linear(2 * width, out))


def _conv(wide: int, width: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(wide, width, 3, stride, 1), nn.ReLU()


class Text2SceneModel(PreTrainedModel):  # type: ignore[misc,unused-ignore]
    """The network, and what it draws."""

    config_class = Text2SceneConfig

    def __init__(self, config: Text2SceneConfig) -> None:
        super().__init__(config)
        width, values = config.width, [len(values) for values in config.attributes.values()]
        self.word = nn.Embedding(len(config.words) + 2, width, padding_idx=_PAD)
        self.reader = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
        self.label = nn.Embedding(len(config.labels) + 2, width)  # the last: nothing yet
        self.value = nn.ModuleList(nn.Embedding(count + 1, width) for count in values)  # the last: none
        self.see = nn.Sequential(*_conv(width, width, 2), *_conv(width, width))
        self.where = nn.Parameter(0.1 * torch.randn(width, config.cells, config.cells))
        self.state = ConvGRU(width)
        self.look = nn.Conv2d(width, 1, 1)
        self.ask = Attention(2 * width, 2 * width, width, config.heads)
        self.say = _mlp(3 * width, width, len(config.labels) + 1)
        self.ask_more = Attention(3 * width, 2 * width, width, config.heads)
        self.look_more = nn.Linear(width, width)
        self.say_values = nn.ModuleList(_mlp(4 * width, width, count) for count in values)
        self.say_sizes = nn.ModuleList(_mlp(5 * width, width, config.sizes) for _ in range(2))
        self.about = nn.Linear(5 * width, width)
        sub = (config.grid // config.cells) ** 2
        self.place = nn.Sequential(*_conv(2 * width, width), *_conv(width, width), nn.Conv2d(width, sub, 1))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep torch's own initial weights, which the caller's seed chooses."""

    # Reading and looking ---------------------------------------------------------------------------------------------

    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the words' states [B, L, 2C] and which words are there [B, L]."""
        there, embedded = ids != _PAD, self.word(ids)
        lengths = there.sum(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.reader(packed)[0], True, 0.0, ids.shape[1])
        return torch.cat([states, embedded], -1), there

    def paint(self, canvas: torch.Tensor, things: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the canvas [B, C, 2c, 2c] with one more thing each: its embedding inside its box, over the others."""
        inside = _coverage(things["boxes"], canvas.shape[-1])[:, None]
        ink = self.label(things["labels"]) + self._values(things["attributes"])
        return canvas * (1 - inside) + inside * ink[:, :, None, None]

    def _values(self, values: torch.Tensor) -> torch.Tensor:
        """Return the summed embeddings [B, C] of attributes [B, K]; −1 is none."""
        parts = [table(values[:, k] % len(table.weight)) for k, table in enumerate(self.value)]  # −1: the last row
        return torch.stack(parts).sum(0) if parts else values.new_zeros((len(values), 1), dtype=self.where.dtype)

    def start(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return an empty canvas, the first state, and the label before the first."""
        width, cells = self.config.width, self.config.cells
        empty = self.where.new_zeros(count, width, 2 * cells, 2 * cells)
        nothing = torch.full((count,), len(self.config.labels) + 1, device=empty.device)
        return empty, self.where.expand(count, -1, -1, -1), nothing

    # One step --------------------------------------------------------------------------------------------------------

    def choose(
        self, text: tuple[torch.Tensor, torch.Tensor], state: torch.Tensor, before: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits of the next label, what was read for it [B, C], and α^o."""
        weights = self.look(state).flatten(1).softmax(-1)
        seen = (state.flatten(2) * weights[:, None]).sum(-1)
        last = self.label(before)
        heard, attention = self.ask(torch.cat([seen, last], 1), *text)
        return self.say(torch.cat([seen, last, heard], 1)), heard, attention

    def describe(
        self, text: tuple[torch.Tensor, torch.Tensor], state: torch.Tensor, label: torch.Tensor, heard: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Return logits of the attributes of a thing of this label, what is known of it [B, 4C], and α^a."""
        thing = self.label(label)
        weights = (state * self.look_more(thing)[:, :, None, None]).mean(1).flatten(1).softmax(-1)
        seen = (state.flatten(2) * weights[:, None]).sum(-1)
        more, attention = self.ask_more(torch.cat([thing, heard, seen], 1), *text)
        known = torch.cat([thing, heard, more, seen], 1)
        return [head(known) for head in self.say_values], known, attention

    def put(
        self, state: torch.Tensor, known: torch.Tensor, values: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return logits of width and height, and of the place [B, g²], of a thing with these attributes."""
        known = torch.cat([known, self._values(values).expand(-1, self.config.width)], 1)
        about = self.about(known)[:, :, None, None].expand_as(state)
        maps = self.place(torch.cat([state, about], 1))
        places = functional.pixel_shuffle(maps, self.config.grid // self.config.cells).flatten(1)
        return [head(known) for head in self.say_sizes], places

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, attributes: torch.Tensor, boxes: torch.Tensor) -> Steps:
        """Return what each step says, given the true things before it: labels [B, T], attributes [B, T, K], boxes."""
        text, said = self.read(ids), Steps([], [], [], [], [], [])
        canvas, state, before = self.start(len(ids))
        for step in range(labels.shape[1]):
            state = self.state(self.see(canvas), state)
            logits, heard, on_object = self.choose(text, state, before)
            label, values = labels[:, step].clamp(min=END), attributes[:, step]
            of_values, known, on_attributes = self.describe(text, state, label, heard)
            sizes, places = self.put(state, known, values)
            one = (logits, of_values, sizes, places, on_object, on_attributes)
            for part, many in zip(one, vars(said).values(), strict=True):
                many.append(part)
            things = {"labels": label, "attributes": values, "boxes": boxes[:, step]}
            canvas, before = self.paint(canvas, things), label
        return said

    # Composing -------------------------------------------------------------------------------------------------------

    @torch.no_grad()  # type: ignore[untyped-decorator,unused-ignore]
    def compose(
        self, prompts: Sequence[str], seeds: Sequence[int] | None = None, temperature: float = 0.0
    ) -> list[Scene]:
        """Return one scene per prompt. Temperature 0 takes the likeliest of everything; seeds matter above it."""
        config, device, count = self.config, self.where.device, len(prompts)
        dice = [torch.Generator().manual_seed(int(seed)) for seed in (seeds or range(count))]
        text = self.read(config.ids(prompts).to(device))
        canvas, state, before = self.start(count)
        scenes: list[list[Thing]] = [[] for _ in prompts]
        ended = torch.zeros(count, dtype=torch.bool, device=device)

        def pick(logits: torch.Tensor) -> torch.Tensor:
            if temperature <= 0:
                return logits.argmax(-1)
            chances = (logits.float() / temperature).softmax(-1).cpu()
            drawn = [torch.multinomial(row, 1, generator=one) for row, one in zip(chances, dice, strict=True)]
            return torch.cat(drawn).to(device)

        for _ in range(config.most):
            state = self.state(self.see(canvas), state)
            logits, heard, _ = self.choose(text, state, before)
            label = pick(logits)
            of_values, known, _ = self.describe(text, state, label, heard)
            values = torch.stack([pick(one) for one in of_values], 1) if of_values else label.new_zeros(count, 0)
            of_sizes, places = self.put(state, known, values)
            boxes = self.boxes(pick(places), torch.stack([pick(one) for one in of_sizes], 1))
            ended = ended | (label == END)
            if bool(ended.all()):
                break
            for row in (~ended).nonzero().flatten().tolist():
                scenes[row].append(self._thing(label[row], values[row], boxes[row]))
            canvas, before = self.paint(canvas, {"labels": label, "attributes": values, "boxes": boxes}), label
        return [self._scene(things) for things in scenes]

    def boxes(self, places: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Return the boxes [B, 4] of places [B] and sizes [B, 2] on their grids."""
        grid = self.config.grid
        centres = torch.stack([places % grid, places // grid], 1).add(0.5) / grid
        half = (sizes + 1) / self.config.sizes / 2
        return torch.cat([centres - half, centres + half], 1)

    def _thing(self, label: torch.Tensor, values: torch.Tensor, box: torch.Tensor) -> Thing:
        thing: Thing = {"label": self.config.labels[int(label) - 1], "box": [round(float(edge), 4) for edge in box]}
        for (name, known), value in zip(self.config.attributes.items(), values, strict=True):
            thing[name] = known[int(value)]
        return {name: value for name, value in thing.items() if value != ""}  # "": it has no such attribute

    def _scene(self, things: list[Thing]) -> Scene:
        """Return a scene; a thing that is the background leaves the list."""
        name, behind = self.config.background, None
        for thing in things:
            behind = thing.get(self.config.ink) if name is not None and thing["label"] == name else behind
        return {"background": behind, "objects": [thing for thing in things if thing["label"] != name]}

    # Drawing ---------------------------------------------------------------------------------------------------------

    def picture(self, scene: Scene, side: int | None = None) -> Image.Image:
        """Draw a scene: RGB, `side` pixels wide and high."""
        side = side or self.config.side
        fine = side * (8 if side <= 128 else 4)  # samples per side
        sheet = Image.new("RGB", (fine, fine), self.colour(scene["background"], _EMPTY))
        for thing in scene["objects"]:
            left, top, right, bottom = (round(edge * fine) for edge in thing["box"])
            part = self.part(thing)
            if part is not None and right > left and bottom > top:
                with Image.open(part) as file:
                    scaled = file.convert("RGBA").resize((right - left, bottom - top), Image.Resampling.LANCZOS)
                sheet.paste(scaled, (left, top), scaled)
            elif part is None:
                corners = [(x * fine, y * fine) for x, y in self._corners(thing)]
                ImageDraw.Draw(sheet).polygon(corners, fill=self.colour(thing.get(self.config.ink), _OTHER))
        return sheet.resize((side, side), Image.Resampling.BOX)

    def svg(self, scene: Scene, side: int | None = None) -> str:
        """Draw a scene as SVG; each thing has a title."""
        side = side or self.config.side
        shapes = []
        for thing in scene["objects"]:
            title = " ".join(str(thing[name]) for name in (*self.config.attributes, "label") if name in thing)
            part, box = self.part(thing), [round(edge * side, 2) for edge in thing["box"]]
            if part is None:
                points = " ".join(f"{x * side:.2f},{y * side:.2f}" for x, y in self._corners(thing))
                shape = f'<polygon points="{points}" fill="rgb{self.colour(thing.get(self.config.ink), _OTHER)}">'
                end = "</polygon>"
            else:
                data = f"image/{part.suffix[1:].lower()};base64,{base64.b64encode(part.read_bytes()).decode()}"
                where = f'x="{box[0]}" y="{box[1]}" width="{box[2] - box[0]:.2f}" height="{box[3] - box[1]:.2f}"'
                shape = f'<image {where} preserveAspectRatio="none" href="data:{data}">'
                end = "</image>"
            shapes.append(f"{shape}<title>{html.escape(title)}</title>{end}")
        behind = f'<rect width="{side}" height="{side}" fill="rgb{self.colour(scene["background"], _EMPTY)}"/>'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}" width="{side}" height="{side}">'
        return "\n".join([head, behind, *shapes, "</svg>"]) + "\n"

    def colour(self, name: str | None, otherwise: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the RGB of a colour's name."""
        red, green, blue = self.config.palette.get(name or "", otherwise)
        return int(red), int(green), int(blue)

    def _corners(self, thing: Thing) -> list[tuple[float, float]]:
        """Return the corners of a thing's outline; of a label without one, those of its box."""
        left, top, right, bottom = thing["box"]
        outline = self.config.outlines.get(thing["label"], [(-1, -1), (1, -1), (1, 1), (-1, 1)])
        x, y = (left + right) / 2, (top + bottom) / 2
        return [(x + dx * (right - left) / 2, y + dy * (bottom - top) / 2) for dx, dy in outline]

    def part(self, thing: Thing) -> Path | None:
        """Return the file of `parts/` whose name fits a thing best, or None: see `fitting`."""
        folder = Path(str(self.config._name_or_path)) / "parts"
        files = sorted(file for file in folder.iterdir() if file.suffix in PARTS) if folder.is_dir() else []
        return fitting(files, thing, self.config.attributes)


def fitting(files: Sequence[Path], thing: Thing, attributes: Mapping[str, Sequence[str]]) -> Path | None:
    """Return the file named after a thing's label and the most of its attributes, or None.

    `red circle.png` shows a circle that is red; `circle.png` any circle. A name with another value does not fit.
    """
    best: tuple[int, Path | None] = (-1, None)
    for file in files:
        rest = words_of(file.stem)
        if not set(words_of(thing["label"])) <= set(rest):
            continue
        rest = [word for word in rest if word not in words_of(thing["label"])]
        own = {word for name in attributes for word in words_of(str(thing.get(name, "")))}
        other = {word for values in attributes.values() for value in values for word in words_of(value)} - own
        if not other & set(rest) and (fits := len(own & set(rest))) > best[0]:
            best = fits, file
    return best[1]


def _coverage(boxes: torch.Tensor, side: int) -> torch.Tensor:
    """Return the share of each cell of a side × side canvas that boxes [B, 4] cover: [B, side, side]."""
    low = torch.arange(side, device=boxes.device) / side

    def along(start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        over = torch.minimum(end[:, None], low + 1 / side) - torch.maximum(start[:, None], low)
        return (over * side).clamp(0, 1)

    return along(boxes[:, 1], boxes[:, 3])[:, :, None] * along(boxes[:, 0], boxes[:, 2])[:, None]
