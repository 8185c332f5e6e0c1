"""Text encoders: CLIP and T5 of transformers by path, open_clip's towers made into CLIPs, and what is refused."""

import contextlib
import json
from pathlib import Path

import pytest
import tiny_towers
import torch

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.score.clip_model import ClipModel
from capstan.training.models.diffusion.config import EncoderSettings, TextSettings
from capstan.training.models.diffusion.dit import DiT
from capstan.training.models.diffusion.mmdit import MMDiT
from capstan.training.models.diffusion.text_encoders import Slot, open_encoders
from capstan.training.models.diffusion.unet import UNet, XlUNet

TEXTS = ["a red square, number 3", "", "A BLUE square & more", "a green square " * 9]
PROJECTED = Slot("text_encoder", layer="penultimate", projected=True)


def opened(slots, *named):
    return open_encoders(slots, TextSettings(pretrained=named))


@pytest.mark.parametrize(
    ("text", "more"), [({}, {}), ({}, {"quick_gelu": True}), ({"mlp_ratio": 2.0}, {"custom_text": True})]
)
def test_an_open_clip_tower_becomes_a_clip_that_gives_the_same(tmp_path, text, more):
    folder = tiny_towers.save_open_clip(tmp_path / "tower", text, **more)
    states = opened([PROJECTED], folder)(TEXTS)
    loaded = ClipModel(folder, None, "fp32", "x").load("cpu")
    torch.testing.assert_close(states["text_pooled"], loaded.texts(TEXTS), atol=1e-5, rtol=1e-4)
    seen = []
    source = getattr(loaded._model, "text", loaded._model)
    hook = source.transformer.resblocks[-2].register_forward_hook(lambda _, args, out: seen.append(out))
    loaded.texts(TEXTS)
    hook.remove()
    torch.testing.assert_close(states["text_states"], seen[0][: len(TEXTS)], atol=1e-5, rtol=1e-4)
    last = opened([Slot("text_encoder")], folder)(TEXTS)["text_states"]  # without the projection: Stable Diffusion's
    assert last.shape == states["text_states"].shape


@pytest.mark.slow
def test_an_open_clip_by_name_has_clips_vocabulary(tmp_path):
    """With weights from a file: the real vocabulary of 49408 ids, and a real shape."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model("RN50-quickgelu", pretrained=None)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    chosen = EncoderSettings(model="RN50-quickgelu", pretrained=str(tmp_path / "weights.pt"))
    text = opened([PROJECTED], chosen)
    prompts = ["a red square", "naïve café — 3 dogs!"]
    tokens = open_clip.get_tokenizer("RN50-quickgelu")(prompts)
    torch.testing.assert_close(text.ids(prompts)["ids"], tokens)
    with torch.no_grad():
        wanted = model.eval().encode_text(tokens)
    torch.testing.assert_close(text(prompts)["text_pooled"], wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("text", "name"),
    [({"embed_cls": True}, "embed_cls"), ({"no_causal_mask": True}, "no_causal_mask"), ({"ls_init_value": 0.1}, "ls_")],
)
def test_towers_that_transformers_cannot_compute_are_refused(tmp_path, text, name):
    folder = tiny_towers.save_open_clip(tmp_path / "tower", text, custom_text=True)
    with pytest.raises(RecipeError, match=rf"train\.diffusion\.text\.pretrained: the text tower of .* has {name}"):
        opened([PROJECTED], folder)


def test_a_clip_and_a_t5_by_path(tmp_path):
    clip, t5 = tiny_towers.save_clip(tmp_path / "clip"), tiny_towers.save_t5(tmp_path / "t5")
    states = opened(MMDiT.slots, clip, clip, t5)(TEXTS)
    assert {name: tuple(value.shape) for name, value in states.items()} == {
        "text_states": (4, 16, 16),
        "text_pooled": (4, 20),
        "text_states_2": (4, 16, 16),
        "text_pooled_2": (4, 20),
        "text_states_3": (4, 256, 40),
    }
    alone = opened(DiT.slots, t5)(TEXTS)
    assert tuple(alone["text_states"].shape) == (4, 300, 40)
    assert alone["text_mask"].sum(1).tolist()[1] == 1  # of an empty text, only its end


def test_a_pipelines_folder_brings_all_its_encoders(tmp_path):
    tiny_towers.save_clip(tmp_path / "p" / "text_encoder", projected=False)
    tiny_towers.save_clip(tmp_path / "p" / "text_encoder_2", seed=1)
    for name in ("tokenizer", "tokenizer_2"):
        tiny_towers.WORDS.save(tmp_path / "p" / name)
    text = open_encoders(XlUNet.slots, TextSettings(pretrained=str(tmp_path / "p")))
    assert [tower.slot.name for tower in text.encoders] == ["text_encoder", "text_encoder_2"]


def test_what_states_depend_on_is_in_their_identity(tmp_path):
    clip, other = (tiny_towers.save_clip(tmp_path / f"clip-{seed}", seed=seed) for seed in (0, 1))
    first, used = opened(UNet.slots, clip).identity(), opened(UNet.slots, clip)
    used(TEXTS)
    assert first == used.identity()
    assert json.loads(json.dumps(first)) == first
    assert first != opened(UNet.slots, other).identity()  # weights
    assert first != opened([PROJECTED], clip).identity()  # layer
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        config = json.loads((tmp_path / "clip-0" / name).read_text())
        (tmp_path / "clip-0" / name).write_text(json.dumps(config | {"pad_token": "!"}))
    assert first != opened(UNet.slots, clip).identity()  # padding


def test_encoders_that_do_not_fit_are_refused(tmp_path):
    clip, t5 = tiny_towers.save_clip(tmp_path / "clip"), tiny_towers.save_t5(tmp_path / "t5")
    plain = tiny_towers.save_clip(tmp_path / "plain", projected=False)
    for slots, named, problem in (
        (UNet.slots, [clip, clip], "names 2 text encoders; this network's pipeline has clip"),
        (MMDiT.slots, [clip], r"names 1 text encoder; this network's pipeline has clip, clip, t5 \(optional\)"),
        (UNet.slots, [t5], "is not a CLIP, which text_encoder must be"),
        (DiT.slots, [clip], "is not a T5, which text_encoder must be"),
        (XlUNet.slots, [clip, plain], "lacks text_projection.weight"),
        (UNet.slots, [str(tmp_path / "nothing")], "no text encoder at"),
        (
            UNet.slots,
            [EncoderSettings(model="ViT-B-33", pretrained="x.pt")],
            "'ViT-B-33' is neither a folder nor an open_clip model",
        ),
        (
            UNet.slots,
            [EncoderSettings(model="ViT-L-14", pretrained="openai")],
            "Fix: .*ViT-L-14-quickgelu",
        ),
    ):
        with pytest.raises(RecipeError, match=problem) as refused:
            opened(slots, *named)
        assert str(refused.value).startswith("train.diffusion.text.pretrained"), refused.value


def test_code_in_a_folder_never_runs_and_is_never_asked_about(tmp_path, monkeypatch):
    """transformers would ask on the terminal whether to run it."""
    folder = Path(tiny_towers.save_t5(tmp_path / "t5"))
    trace = tmp_path / "trace"
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w').write('run')\n")
    for name, classes in (
        ("tokenizer_config.json", {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}),
        ("config.json", {"AutoConfig": "own.Config", "AutoModel": "own.Model"}),
    ):
        content = json.loads((folder / name).read_text()) | {"auto_map": classes, "tokenizer_class": "Tokenizer"}
        (folder / name).write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with contextlib.suppress(RecipeError):
        opened(DiT.slots, str(folder))
    assert not trace.exists()
