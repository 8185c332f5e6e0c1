"""A VQModel as Janus' first stage: the same codes and the same images, whatever its shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import VQModel
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from capstan.training.models.dalle.janus import stage_weights


@pytest.mark.parametrize(
    "shape",
    [
        {"block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 2},
        {"block_out_channels": [32, 32, 64], "norm_num_groups": 32, "mid_block_add_attention": False},
        {"block_out_channels": [8], "norm_num_groups": 2, "vq_embed_dim": 3},
    ],
)
def test_a_vq_model_becomes_a_janus_vqvae_that_computes_the_same(shape: dict[str, Any]) -> None:
    torch.manual_seed(0)
    levels, channels = len(shape["block_out_channels"]), shape["block_out_channels"]
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    vq = VQModel(**blocks, latent_channels=4, num_vq_embeddings=24, **shape).eval()
    with torch.no_grad():
        for weight in vq.parameters():  # norms and biases that do something
            weight.add_(torch.randn_like(weight) * 0.1)
        vq.quantize.embedding.weight.normal_(0, 0.5)
    copies = 32 // shape["norm_num_groups"]
    config = JanusVQVAEConfig(
        embed_dim=vq.quantize.embedding.weight.shape[1] + 2,
        num_embeddings=24,
        latent_channels=4,
        base_channels=channels[0] * copies,
        channel_multiplier=[one // channels[0] for one in channels],
        num_res_blocks=vq.config.layers_per_block,
        num_patches=16 // 2 ** (levels - 1),
    )
    janus = JanusVQVAE(config).eval()
    janus.load_state_dict(stage_weights(vq))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        latents = vq.encode(images).latents
        tokens = torch.cdist(latents.movedim(1, -1).flatten(0, 2), vq.quantize.embedding.weight).argmin(1)
        assert len(tokens.unique()) > 4
        assert torch.equal(janus.encode(images).image_tokens.flatten(), tokens)
        ours = vq.decode(latents).sample
        theirs = janus.decode(tokens.view(2, -1))
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
