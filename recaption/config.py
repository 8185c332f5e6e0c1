"""The recipe's section `recaption`: plain mapping → a validated `RecaptionConfig`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from capstan.pipeline.config import Recipe, Section, validate
from capstan.pipeline.errors import RecipeError
from capstan.recaption.lint.linter import Settings as LintSettings

SlotName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]


class Decoding(Section):
    """How a caption is chosen from the model's probabilities. Retries of bad captions are drawn by `top_p` always."""

    method: Literal["greedy", "top_p", "beam"] = "greedy"
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9  # the smallest set of tokens that holds this much
    temperature: Annotated[float, Field(gt=0)] = 1.0  # of what is drawn
    seed: int = 0  # of what is drawn; each image, slot and attempt has its own seed, made from this one
    beams: Annotated[int, Field(ge=2, le=64)] = 4  # method beam
    length_penalty: Annotated[float, Field(ge=0)] = 1.0  # method beam: log-probability / tokens^this is compared


class Server(Section):
    """Engine `openai`: the server that is asked. All but `extra` is no part of a layer's id: a server may move."""

    url: str | None = None  # up to /v1, e.g. http://127.0.0.1:8000/v1
    key_env: str = "OPENAI_API_KEY"  # name of the environment variable that holds the key; unset: no key is sent
    concurrency: Annotated[int, Field(ge=1, le=10_000)] = 32  # requests in flight in one model worker
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None  # of all model workers together
    tokens_per_minute: Annotated[float, Field(gt=0)] | None = None  # of all together, prompts and captions; estimated
    timeout_s: Annotated[float, Field(gt=0)] = 120.0  # over one exchange
    retries: Annotated[int, Field(ge=0, le=100)] = 6  # of a request that met 408, 409, 429, 5xx or no answer
    # further fields of each request, e.g. {chat_template_kwargs: {enable_thinking: false}}; part of a layer's id
    extra: dict[str, Any] = Field(default={})

    @field_validator("url")
    @classmethod
    def _has_a_scheme(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError(f"{url} begins with neither http:// nor https://; write e.g. http://127.0.0.1:8000/v1")
        return url


class RecaptionConfig(Section):
    """One recaptioning run; everything but `server`, `batch` and `device` is part of the layer's id."""

    engine: Literal["coca", "transformers", "openai"] = "coca"
    # coca: a name of open_clip, or the folder of a captioner's product (or of its run); transformers: a folder or a
    # name on the hub; openai: what the server calls it
    model: str = "coca_ViT-L-14"
    # coca: open_clip's tag, or a checkpoint file; null for a folder, which has its own weights. transformers: the
    # hub's revision. openai: which weights the server holds, in your words
    pretrained: str | None = None
    slots: list[SlotName] = Field(default=["short", "descriptive"], min_length=1)
    # slot → prompt. coca: words that the caption continues, before the model's own; the others: what the model is told,
    # in which {original} stands for the caption that came with the image
    prompts: dict[SlotName, str] = Field(default={})
    system: str | None = None  # transformers, openai: the system message; null: none
    max_tokens: Annotated[int, Field(ge=1)] | None = None  # new tokens a caption; null: coca what fits, others 256
    context: Annotated[int, Field(ge=8)] | None = None  # coca: tokens; beyond the model's own, positions are stretched
    max_side: Annotated[int, Field(ge=16)] | None = 1024  # transformers, openai: longest side in pixels; null: as it is
    decoding: Decoding = Decoding()
    # null: coca fp32; transformers bf16 on a GPU and fp32 elsewhere. bf16 is faster on GPUs
    precision: Literal["fp32", "bf16"] | None = None
    server: Server = Server()
    lint: LintSettings = LintSettings()  # what is done where something is wrong with a caption
    batch: Annotated[int, Field(ge=1)] = 32  # images captioned together
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _slots_are_slots(self) -> RecaptionConfig:
        if len(set(self.slots)) < len(self.slots):
            raise ValueError("slots names a slot twice; name each once")
        if "original" in self.slots:
            raise ValueError("slots may not name `original`: that is the caption that came with the image")
        if unused := set(self.prompts) - set(self.slots):
            raise ValueError(f"prompts names {', '.join(sorted(unused))}, which slots does not; add it to slots")
        return self

    @model_validator(mode="after")
    def _fits_the_engine(self) -> RecaptionConfig:
        if self.engine == "openai" and self.server.url is None:
            raise ValueError("server.url is missing; engine openai needs one, e.g. http://127.0.0.1:8000/v1")
        if self.engine == "openai" and self.decoding.method == "beam":
            raise ValueError("decoding.method beam is not part of the protocol that servers speak; use greedy or top_p")
        if self.engine != "coca" and self.context is not None:
            raise ValueError("context is only for engine coca; remove it")
        if self.engine == "coca" and self.system is not None:
            raise ValueError("system is only for engines that converse; remove it")
        return self

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> RecaptionConfig:
        """The validated section `recaption`. Raises RecipeError."""
        if recipe.recaption is None:
            hint = "add the section, e.g. recaption: {engine: coca, model: ./captioner}"
            raise RecipeError("recaption", "is missing", hint)
        return validate(cls, recipe.recaption, "recaption")
