"""The recipe section `recaption`: plain mapping → validated `RecaptionConfig`"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from capstan.pipeline.config import Recipe, Section, validate
from capstan.recaption.keys import announce_server, check_key_name
from capstan.recaption.lint.linter import Settings as LintSettings

SlotName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]


class Decoding(Section):
    """Decoding settings. Retries of bad captions always sample with `top_p`."""

    method: Literal["greedy", "top_p", "beam"] = "greedy"
    """How tokens are chosen: always the most probable one, by nucleus sampling, or by beam search."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Nucleus sampling: tokens are drawn from the smallest set with this total probability."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of method top_p."""
    seed: int = 0
    """Seed of method top_p; the seed of each image, slot and attempt is derived from it."""
    beams: Annotated[int, Field(ge=2, le=64)] = 4
    """Number of beams of method beam."""
    length_penalty: Annotated[float, Field(ge=0)] = 1.0
    """Exponent of the length for method beam: a caption's score is log-probability / tokens^this."""


class Server(Section):
    """The server of engine `openai`. Only `extra` is part of a layer's id: a server may move."""

    url: str | None = None
    """URL of the server up to /v1, e.g. http://127.0.0.1:8000/v1; null: only for other engines."""
    key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable with the API key; none is sent if it is unset."""
    concurrency: Annotated[int, Field(ge=1, le=10_000)] = 32
    """Number of requests in flight per model worker."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Largest number of requests per minute, over all model workers; null: no limit."""
    tokens_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Largest number of tokens per minute (prompts and captions, estimated), over all model workers; null: no limit."""
    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds per request."""
    retries: Annotated[int, Field(ge=0, le=100)] = 6
    """Number of further tries per request, after 408, 409, 429, 5xx or no answer."""
    extra: dict[str, Any] = Field(default={})
    """More request fields, e.g. {chat_template_kwargs: {enable_thinking: false}}; part of a layer's id."""

    @field_validator("url")
    @classmethod
    def _has_a_scheme(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError(f"{url} does not start with http:// or https://; set e.g. http://127.0.0.1:8000/v1")
        return url


class Vllm(Section):
    """Engine `vllm`: servers that Capstan starts. Only `serve` and `max_model_len` are part of a layer's id."""

    replicas: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Number of servers; auto: as many as the GPUs allow."""
    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    """Number of GPUs per server."""
    serve: Literal["auto", "vllm", "transformers"] = "auto"
    """What serves the model; auto: vllm on a GPU, `transformers serve` without one."""
    max_model_len: Annotated[int, Field(ge=64)] | None = None
    """Context in tokens; null: the model's, if it fits."""
    start_s: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds until a server must be healthy, downloads included."""


class Frames(Section):
    """Captions of clips: the frames that the model sees. Part of a layer's id."""

    count: Annotated[int, Field(ge=2, le=64)] = 4
    """Number of frames of a clip, evenly spread from its first to its last one."""
    show: Literal["sheet", "list"] = "sheet"
    """Whether the frames are one image, or a list of images, for servers that take several."""
    columns: Annotated[int, Field(ge=1)] | None = None
    """Frames next to each other in a sheet; null: so that it is nearly a square of frames."""

    @property
    def across(self) -> int:
        """The number of frames next to each other."""
        return self.columns or math.ceil(math.sqrt(self.count))


class RecaptionConfig(Section):
    """Settings of a recaptioning run. All but `server` (except `extra`), `batch` and `device` enter the layer's id."""

    engine: Literal["coca", "transformers", "openai", "vllm"] = "coca"
    """What writes the captions: an open_clip CoCa, a transformers model, an OpenAI-compatible server, or vLLM."""
    model: str = "coca_ViT-L-14"
    """The model: an open_clip name or a captioner's folder (coca), a folder or hub name (transformers, vllm), or the
    server's name (openai)."""
    pretrained: str | None = None
    """Weights: an open_clip tag or checkpoint file (coca), a hub revision (transformers), a free label (openai); null:
    the folder's own."""
    slots: list[SlotName] = Field(default=["short", "descriptive"], min_length=1)
    """Kinds of captions to write, e.g. short and descriptive."""
    prompts: dict[SlotName, str] = Field(default={})
    """Slot → prompt: words that the caption continues (coca), or the instruction, in which {original} is the original
    caption."""
    system: str | None = None
    """The system message of chat engines; null: none."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Largest number of new tokens per caption; null: as many as fit (coca), 256 (others)."""
    context: Annotated[int, Field(ge=8)] | None = None
    """Context length of engine coca in tokens; null: the model's. Positions are interpolated if it is longer."""
    max_side: Annotated[int, Field(ge=16)] | None = 1024
    """Longest side in pixels of images that chat engines see; null: full size."""
    frames: Frames | None = None
    """Frames of clips, in place of their images; null: images. The dataset has source.parts: [mp4]."""
    decoding: Decoding = Decoding()
    """How captions are decoded: greedily, by sampling or by beam search."""
    precision: Literal["fp32", "bf16"] | None = None
    """Number format; null: fp32 (coca), or bf16 on a GPU and fp32 elsewhere (transformers)."""
    server: Server = Server()
    """The server of engine openai."""
    vllm: Vllm = Vllm()
    """Servers of engine vllm."""
    lint: LintSettings = LintSettings()
    """How bad captions are detected and handled."""
    batch: Annotated[int, Field(ge=1)] = 32
    """Number of images per batch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto: the GPU if there is one, else the CPU."""

    @model_validator(mode="before")
    @classmethod
    def _engine_may_be_a_section(cls, section: Any) -> Any:
        """Accept `engine: {kind: vllm, model: name, replicas: 2}`."""
        if not isinstance(section, dict) or not isinstance(section.get("engine"), dict):
            return section
        engine = dict(section["engine"])
        own = {name: engine.pop(name) for name in ("model", "pretrained") if name in engine}
        kind = engine.pop("kind", None)
        if twice := own.keys() & section.keys():
            raise ValueError(f"{', '.join(sorted(twice))} is set twice; set it once")
        if engine and kind != "vllm":
            raise ValueError(f"engine.{min(map(str, engine))} applies only to kind vllm; remove it")
        given = section.get("vllm", {})
        settings = {"vllm": {**given, **engine}} if isinstance(given, dict) else {}  # else the section is refused
        return {**section, **own, **settings, "engine": kind}

    @model_validator(mode="after")
    def _slots_are_slots(self) -> RecaptionConfig:
        if len(set(self.slots)) < len(self.slots):
            raise ValueError("slots lists a slot twice; list each once")
        if "original" in self.slots:
            raise ValueError("slots may not include `original`, the caption that came with the image")
        if unused := set(self.prompts) - set(self.slots):
            raise ValueError(f"prompts has {', '.join(sorted(unused))}, which slots has not; add it to slots")
        return self

    @model_validator(mode="after")
    def _fits_the_engine(self) -> RecaptionConfig:
        if self.engine == "openai" and self.server.url is None:
            raise ValueError("server.url is missing; engine openai requires it, e.g. http://127.0.0.1:8000/v1")
        if self.engine == "vllm" and self.server.url is not None:
            raise ValueError("server.url applies only to engine openai; remove it: engine vllm starts its servers")
        if self.engine in ("openai", "vllm") and self.decoding.method == "beam":
            raise ValueError("decoding.method beam is not supported by OpenAI-compatible servers; use greedy or top_p")
        if self.engine != "coca" and self.context is not None:
            raise ValueError("context applies only to engine coca; remove it")
        if self.frames is not None and self.frames.show == "list" and self.engine not in ("openai", "vllm"):
            raise ValueError(f"frames.show list needs a server, and engine {self.engine} sees one image; use sheet")
        if self.engine == "coca" and self.system is not None:
            raise ValueError("system applies only to chat engines; remove it")
        return self

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> RecaptionConfig:
        """Return the validated section `recaption`. Raises RecipeError."""
        hint = "add the section, e.g. recaption: {engine: coca, model: ./captioner}"
        config = recipe.section("recaption", lambda raw: validate(cls, raw, "recaption"), hint)
        config.check_key()
        return config

    def check_key(self) -> None:
        """Raise RecipeError if the recipe names a key that may not be sent to a server."""
        if self.engine == "openai":
            check_key_name(self.server.key_env)

    def announce(self) -> None:
        """Log to which server images and prompts go, and with which key; nothing for local engines."""
        if self.engine == "openai":
            announce_server(str(self.server.url), self.server.key_env)
