"""A product → the folder of transformers' JanusForConditionalGeneration, which draws its images without Capstan

    model = JanusForConditionalGeneration.from_pretrained(DIR)
    tokens = model.generate(**CLIPTokenizer.from_pretrained(DIR)(prompt, return_tensors="pt"), generation_mode="image")
    images = model.decode_image_tokens(tokens)      # [N, H, W, 3] in −1 … 1

The transformer's weights are those of Janus. Its first stage becomes a JanusVQVAE, which computes the same, although
Janus fixes what a VQModel leaves open:

    codes of length 1     e → (e, ‖e‖²/2, c) / R with c such that all have the length R, and z → (z, −1, 0): the nearest
                          code stays the nearest, and the decoder's first layer multiplies by R and drops the last two
    32 groups per norm    with g < 32 groups, all channels are there 32/g times, so that a group is a group of before
    attention everywhere  where a VQModel has none, it adds 0
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import torch

from capstan.pipeline.errors import RecipeError
from capstan.training.drawing.drawer import refuse_options
from capstan.training.models.dalle.drawer import FIRST_STAGE, TOKENIZER, load_model
from capstan.training.models.dalle.model import Dalle, text_config, token_config
from capstan.training.models.dalle.tokens import nothing, open_first_stage
from capstan.training.product import read_facts

_GROUPS: Final = 32  # of every normalisation in Janus
_PRECISIONS: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Weights = dict[str, torch.Tensor]


def export_janus(product: Path, folder: Path, *, precision: str, sampler: str | None) -> str:
    """Write the folder; return its kind. Raises RecipeError if Janus has no decoder of the first stage's kind."""
    from transformers import CLIPTokenizer, GenerationConfig, JanusForConditionalGeneration

    from capstan.training.data.tokenizer import Tokenizer

    refuse_options({"sampler": sampler})
    facts, model = read_facts(product), load_model(product)
    codec = open_first_stage(str(product / FIRST_STAGE), "RUN")
    vq = codec.vae
    _check(vq, product)
    tokenizer = Tokenizer.load(product / TOKENIZER)
    side = int(facts["size"]) // codec.factor
    janus = JanusForConditionalGeneration(_config(model, vq, side, tokenizer))
    found = janus.load_state_dict(_weights(model, vq), strict=False)
    unused = ("model.vision_model.", "model.aligner.")
    assert not found.unexpected_keys, found.unexpected_keys
    assert all(key.startswith(unused) for key in found.missing_keys), found.missing_keys
    janus.generation_config = GenerationConfig(**_generation(facts["sampling"], tokenizer))
    janus.to(_PRECISIONS[precision]).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(product / TOKENIZER, model_max_length=int(facts["length"])).save_pretrained(folder)
    return "JanusForConditionalGeneration"


def _check(vq: Any, product: Path) -> None:
    """Raise RecipeError if Janus has no first stage of this shape."""
    hint = "draw with capstan sample, or train on a VQModel of plain blocks (model: dvae or vqgan)"
    config = vq.config
    if type(vq).__name__ != "VQModel":
        raise RecipeError("RUN", f"{product} draws with a {type(vq).__name__}, and Janus with a VQModel alone", hint)
    plain = {*config.down_block_types, *config.up_block_types} <= {"DownEncoderBlock2D", "UpDecoderBlock2D"}
    first, channels = config.block_out_channels[0], config.block_out_channels
    if not plain or config.norm_type != "group" or config.out_channels != 3 or config.act_fn != "silu":
        raise RecipeError("RUN", f"the first stage of {product} has blocks that Janus does not have", hint)
    if _GROUPS % config.norm_num_groups or any(one % first for one in channels):
        problem = f"{config.norm_num_groups} groups or channels {list(channels)}"
        raise RecipeError("RUN", f"the first stage of {product} has {problem}, which Janus cannot have", hint)


def _config(model: Dalle, vq: Any, side: int, tokenizer: Any) -> Any:
    from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

    copies, channels = _copies(vq), vq.config.block_out_channels
    # Janus' tower for reading images is not trained, and as small as can be; drawing takes two numbers from it.
    vision = {"image_size": side, "patch_size": 1, "num_image_tokens": side**2, "hidden_size": 8}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 1, "projection_dim": model.shape.width}
    stage = {
        "latent_channels": vq.config.latent_channels,
        "base_channels": channels[0] * copies,
        "channel_multiplier": [one // channels[0] for one in channels],
        "num_res_blocks": vq.config.layers_per_block,
    }
    return JanusConfig(
        text_config=LlamaConfig(**text_config(model.shape)).to_dict(),
        vision_config=JanusVisionConfig(**vision).to_dict(),
        vq_config=JanusVQVAEConfig(**stage, **token_config(model.shape)).to_dict(),
        image_token_id=nothing(tokenizer),
        tie_word_embeddings=False,
    )


def _generation(sampling: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return the generation config: every field that would otherwise have a default of its own."""
    return {
        "do_sample": True,
        "num_beams": 1,
        "temperature": sampling["temperature"],
        "top_k": sampling["top_k"] or 0,
        "top_p": sampling["top_p"] or 1.0,
        # Janus draws with guidance alone; so close to 1 it changes nothing.
        "guidance_scale": max(sampling["guidance"], 1 + 1e-6),
        "bos_token_id": tokenizer.start,
        "pad_token_id": nothing(tokenizer),
        "generation_kwargs": {"boi_token_id": tokenizer.end},
    }


def _weights(model: Dalle, vq: Any) -> Weights:
    ours = {f"model.{name}" if not name.startswith("lm_head.") else name: w for name, w in model.state_dict().items()}
    return ours | {f"model.vqmodel.{name}": weight.contiguous() for name, weight in stage_weights(vq).items()}


def stage_weights(vq: Any) -> Weights:
    """Return a VQModel's weights as those of a JanusVQVAE that encodes and decodes the same."""
    theirs, copies, made = vq.state_dict(), _copies(vq), Weights()
    codes, norms = theirs["quantize.embedding.weight"], theirs["quantize.embedding.weight"].square().sum(1)
    lifted = torch.cat([codes, norms[:, None] / 2], dim=1)
    lengths = lifted.square().sum(1)
    radius = float(lengths.max().sqrt())
    lifted = torch.cat([lifted, (radius**2 - lengths).clamp(min=0).sqrt()[:, None]], dim=1)
    made["quantize.embedding.weight"] = lifted / radius
    made["quant_conv.weight"] = torch.nn.functional.pad(theirs["quant_conv.weight"], (0, 0, 0, 0, 0, 0, 0, 2))
    made["quant_conv.bias"] = torch.cat([theirs["quant_conv.bias"], torch.tensor([-1.0, 0.0])])
    made["post_quant_conv.weight"] = torch.nn.functional.pad(
        theirs["post_quant_conv.weight"] * radius, (0, 0, 0, 0, 0, 2)
    )
    made["post_quant_conv.bias"] = theirs["post_quant_conv.bias"]
    for half in ("encoder", "decoder"):
        made |= _half(theirs, half, copies, vq.config)
    return made


def _copies(vq: Any) -> int:
    """Return how often each channel must be there for groups of 32 per norm to be those of the VQModel."""
    return int(_GROUPS // vq.config.norm_num_groups)


def _half(theirs: Weights, half: str, copies: int, config: Any) -> Weights:
    """Return the weights of the encoder or the decoder."""
    made, levels, up = Weights(), len(config.block_out_channels), half == "decoder"

    def conv(name: str, target: str, *, inner: bool = True, outer: bool = True) -> None:
        weight, bias = theirs[f"{half}.{name}.weight"], theirs[f"{half}.{name}.bias"]
        made[f"{half}.{target}.weight"] = _widened(weight, copies if inner else 1, copies if outer else 1)
        made[f"{half}.{target}.bias"] = bias.repeat(copies if outer else 1)

    def norm(name: str, target: str) -> None:
        for part in ("weight", "bias"):
            made[f"{half}.{target}.{part}"] = theirs[f"{half}.{name}.{part}"].repeat(copies)

    def residual(name: str, target: str) -> None:
        for number in (1, 2):
            norm(f"{name}.norm{number}", f"{target}.norm{number}")
            conv(f"{name}.conv{number}", f"{target}.conv{number}")
        if f"{half}.{name}.conv_shortcut.weight" in theirs:
            conv(f"{name}.conv_shortcut", f"{target}.nin_shortcut")

    conv("conv_in", "conv_in", inner=False)
    lowest = config.block_out_channels[-1] * copies
    for level in range(levels):
        ours, name = ("up_blocks", "up") if up else ("down_blocks", "down")
        at_lowest = level == (0 if up else levels - 1)
        for block in range(config.layers_per_block + up):
            residual(f"{ours}.{level}.resnets.{block}", f"{name}.{level}.block.{block}")
            if at_lowest:
                made |= {f"{half}.{name}.{level}.attn.{block}.{k}": w for k, w in _no_attention(lowest).items()}
        if level < levels - 1:
            conv(f"{ours}.{level}.{name}samplers.0.conv", f"{name}.{level}.{name}sample.conv")
    residual("mid_block.resnets.0", "mid.block_1")
    residual("mid_block.resnets.1", "mid.block_2")
    attention = _attention(theirs, f"{half}.mid_block.attentions.0", copies) or _no_attention(lowest)
    made |= {f"{half}.mid.attn_1.{name}": weight for name, weight in attention.items()}
    norm("conv_norm_out", "norm_out")
    conv("conv_out", "conv_out", outer=False)
    return made


def _widened(weight: torch.Tensor, inner: int, outer: int) -> torch.Tensor:
    """Return a convolution's weight for copied channels: all outputs are copied, the first copy of the inputs read."""
    read = weight.shape[1] * (inner - 1)
    return torch.nn.functional.pad(weight, (0, 0, 0, 0, 0, read)).repeat(outer, 1, 1, 1)


def _attention(theirs: Weights, name: str, copies: int) -> Weights:
    """Return the weights of diffusers' attention with one head as Janus'; empty if there is none."""
    if f"{name}.to_q.weight" not in theirs:
        return {}
    made = {f"norm.{part}": theirs[f"{name}.group_norm.{part}"].repeat(copies) for part in ("weight", "bias")}
    for ours, target in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        weight, bias = theirs[f"{name}.{ours}.weight"][:, :, None, None], theirs[f"{name}.{ours}.bias"]
        scale = 1.0
        if target in ("q", "k"):  # their product is divided by √channels, and sums over all copies
            scale = math.sqrt(math.sqrt(copies) / copies)
        made[f"{target}.weight"] = _widened(weight, copies, copies) * scale
        made[f"{target}.bias"] = bias.repeat(copies) * scale
    return made


def _no_attention(channels: int) -> Weights:
    """Return the weights of an attention that adds 0."""
    made = {f"{name}.bias": torch.zeros(channels) for name in ("norm", "q", "k", "v", "proj_out")}
    square = torch.zeros(channels, channels, 1, 1)
    return (
        made
        | {"norm.weight": torch.ones(channels)}
        | {f"{name}.weight": square for name in ("q", "k", "v", "proj_out")}
    )
