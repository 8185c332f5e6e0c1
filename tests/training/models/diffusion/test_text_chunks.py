"""Prompts that are longer than their text encoder: read in chunks, in training as in sampling."""

import pytest
import tiny_networks as tiny
import torch
from tiny_towers import LENGTH

from capstan.pipeline.errors import RecipeError
from capstan.training.export import export
from capstan.training.sample import open_sampler

LONG = "a red square, number 3, next to a green square, number 5"  # more tokens than the towers read at once


@pytest.mark.parametrize("network", ["sd", "sdxl"])
def test_long_texts_are_read_in_chunks_in_training_and_in_sampling(make, towers, squares, tmp_path, network):
    text = tiny.settings_of(network, towers)["text"] | {"chunks": 3}
    chunked = {"text": text, "sampling": {"steps": 2, "guidance": 2.0}}
    family, plain = make(network, **chunked), make(network)
    assert plain.text.encoders[0].tokens(LONG) > LENGTH

    states, short = family.text([LONG, ""]), plain.text([LONG, ""])
    for name, value in short.items():
        first = states[name][:, :LENGTH] if "states" in name else states[name]
        torch.testing.assert_close(first, value, msg=name)  # the first chunk is what one alone reads
    name = family.text.encoders[0].slot.states
    other = family.text([LONG.replace("5", "7")])[name]
    assert states[name].shape[1] == 3 * LENGTH
    assert torch.equal(other[:, :LENGTH], states[name][:1, :LENGTH])
    assert not torch.equal(other, states[name][:1])

    batch = family.prepare([tiny.data_of(squares).at(number) for number in (3, 3)])
    batch |= family.text.ids([LONG] * 2)
    text = family.text.given(batch, torch.tensor([True, False]))
    noisy, times = torch.zeros(2, 4, 8, 8), torch.tensor([1, 1])
    here = tiny.told(family.model.net, lambda: family.model(noisy, times, text, batch.get("conditions")))
    run = tiny.save_product(family, tmp_path / "run")
    sampler = open_sampler(run)
    there = tiny.told(getattr(sampler.pipeline, family.backbone.part), lambda: sampler.draw([LONG], [0]))
    assert set(here) == set(there)
    for name, value in here.items():
        torch.testing.assert_close(value, there[name].expand_as(value), atol=1e-5, rtol=1e-4, msg=name)
    with pytest.raises(RecipeError, match=r"^RUN: .* prompts in 3 chunks, and a diffusers pipeline reads one\."):
        export(run, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_chunks_are_for_frozen_clips(make, towers):
    with pytest.raises(RecipeError, match=r"chunks is for frozen encoders; for one that is trained, set length"):
        tiny.parsed(text={"chunks": 2})
    t5 = {"pretrained": [towers["t5"]], "chunks": 2}
    with pytest.raises(RecipeError, match=r"train\.diffusion\.text\.chunks: is 2, and .* has a T5"):
        make("dit", text=t5)
