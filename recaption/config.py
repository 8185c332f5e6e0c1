"""The recipe's section `recaption`: plain mapping → a validated `RecaptionConfig`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config import Recipe, Section, validate
from pipeline.errors import RecipeError
from recaption.lint import Settings as LintSettings

SlotName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]


class Decoding(Section):
    """How a caption is chosen from the model's probabilities."""

    method: Literal["greedy", "top_p"] = "greedy"
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9  # method top_p: the smallest set of tokens that holds this much
    temperature: Annotated[float, Field(gt=0)] = 1.0  # method top_p
    seed: int = 0  # method top_p; each sample and slot has its own seed, drawn from this one


class RecaptionConfig(Section):
    """One recaptioning run; everything but `batch` and `device` is part of the layer's id."""

    engine: Literal["coca"] = "coca"
    model: str = "coca_ViT-L-14"  # a name of open_clip, or the folder of a captioner's product (or of its run)
    pretrained: str | None = None  # open_clip's tag, or a checkpoint file; null for a folder, which has its own weights
    slots: list[SlotName] = Field(default=["short", "descriptive"], min_length=1)
    prompts: dict[SlotName, str] = Field(default={})  # slot → words that each caption continues, before the model's own
    max_tokens: Annotated[int, Field(ge=1)] | None = None  # new tokens a caption; null: what the model's context holds
    decoding: Decoding = Decoding()
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: faster on GPUs, the same captions only at the same batch size
    lint: LintSettings = LintSettings()  # what is done where something is wrong with a caption
    batch: Annotated[int, Field(ge=1)] = 32  # images decoded together
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

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> RecaptionConfig:
        """The validated section `recaption`. Raises RecipeError."""
        if recipe.recaption is None:
            mend = "add the section, e.g. recaption: {engine: coca, model: ./captioner}"
            raise RecipeError("recaption", "is missing", mend)
        return validate(cls, recipe.recaption, "recaption")
