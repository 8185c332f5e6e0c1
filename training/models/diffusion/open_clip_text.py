"""An open_clip text tower → the same function as transformers' CLIP text model.

So a pipeline needs no code of Capstan's. Both are the pre-norm causal transformer of Radford et al. 2021; only the
names of the weights differ. Towers that transformers' class cannot compute are refused: Hugging Face towers, class
tokens (CoCa), layer scale, bidirectional attention, other pooling.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.score.clip_model import BPE_FILE, ClipModel, load_model
from capstan.training.data.tokenizer import Tokenizer
from capstan.training.models.diffusion.config import EncoderSettings

_PLAIN = {  # the values that open_clip's `text_cfg` must have for these keys, if present
    "hf_model_name": None,
    "embed_cls": False,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "ls_init_value": None,
    "proj_type": "linear",
    "proj_bias": False,
    "final_ln_after_pool": False,
    "hf_tokenizer_name": None,
    "tokenizer_kwargs": None,
    "act_kwargs": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
_ANOTHER = "use another text encoder"


def convert(chosen: EncoderSettings, *, projected: bool, field: str) -> tuple[Any, Any]:
    """Return (CLIPTextModel or CLIPTextModelWithProjection, CLIPTokenizer), equivalent to the open_clip tower."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    tower = ClipModel(chosen.model, chosen.pretrained, "fp32", field)
    shape = tower.architecture["text_cfg"]
    for name, plain in _PLAIN.items():
        if shape.get(name, plain) != plain:
            problem = (
                f"the text tower of {chosen.model} has {name}: {shape[name]}, which transformers' CLIP does not support"
            )
            raise RecipeError(field, problem, _ANOTHER)
    words = Tokenizer.clip() if tower.folder is None else _words(tower.folder)
    model = load_model(tower, "cpu")
    source = getattr(model, "text", model)  # custom text towers are submodules
    encoder = (CLIPTextModelWithProjection if projected else CLIPTextModel)(_configuration(tower, words))
    renamed = _renamed({name: weight.detach() for name, weight in source.state_dict().items()}, projected)
    try:
        encoder.load_state_dict(renamed, strict=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise RecipeError(field, f"the text tower of {chosen.model} differs from CLIP's ({first})", _ANOTHER) from None
    return encoder.eval(), _tokenizer(words, encoder.config.max_position_embeddings)


def _words(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder) if (folder / BPE_FILE).is_file() else Tokenizer.clip()


def _configuration(tower: ClipModel, words: Tokenizer) -> Any:
    from transformers import CLIPTextConfig

    shape = tower.architecture["text_cfg"]
    width = int(shape.get("width", 512))
    return CLIPTextConfig(
        vocab_size=int(shape.get("vocab_size", 49408)),
        hidden_size=width,
        intermediate_size=int(width * shape.get("mlp_ratio", 4)),
        projection_dim=tower.dim,
        num_hidden_layers=int(shape.get("layers", 12)),
        num_attention_heads=int(shape.get("heads", 8)),
        max_position_embeddings=int(shape.get("context_length", 77)),
        hidden_act="quick_gelu" if tower.architecture.get("quick_gelu", False) else "gelu",
        layer_norm_eps=float(shape.get("norm_kwargs", {}).get("eps", 1e-5)),
        bos_token_id=words.start,
        eos_token_id=words.end,
        pad_token_id=0,
    )


def _renamed(weights: Mapping[str, torch.Tensor], projected: bool) -> dict[str, torch.Tensor]:
    """Rename open_clip's weights to those of CLIPTextModel, or CLIPTextModelWithProjection if `projected`."""
    tower = "text_model." if projected else ""
    made = {
        f"{tower}embeddings.token_embedding.weight": weights["token_embedding.weight"],
        f"{tower}embeddings.position_embedding.weight": weights["positional_embedding"],
        f"{tower}final_layer_norm.weight": weights["ln_final.weight"],
        f"{tower}final_layer_norm.bias": weights["ln_final.bias"],
    }
    if projected:
        made["text_projection.weight"] = weights["text_projection"].T.contiguous()
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    parts["attn.out_proj"] = "self_attn.out_proj"
    for name, weight in weights.items():
        if not name.startswith("transformer.resblocks."):
            continue
        layer, _, rest = name.removeprefix("transformer.resblocks.").partition(".")
        part, _, kind = rest.rpartition(".")
        into = f"{tower}encoder.layers.{layer}"
        if part in parts:
            made[f"{into}.{parts[part]}.{kind}"] = weight
        elif rest.startswith("attn.in_proj_"):  # query, key and value stacked
            for letter, third in zip("qkv", weight.chunk(3), strict=True):
                made[f"{into}.self_attn.{letter}_proj.{rest.removeprefix('attn.in_proj_')}"] = third.contiguous()
        else:
            made[f"{into}.{rest}"] = weight  # unknown: load_state_dict reports it
    return made


def _tokenizer(words: Tokenizer, length: int) -> Any:
    """Return the tower's vocabulary as transformers' CLIPTokenizer, padded with id 0 as in open_clip."""
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        words.save(Path(folder))
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=length, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer
