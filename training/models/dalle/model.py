"""One causal transformer over text, then image tokens, of the parts of transformers' Janus

Shapes: ids and mask [B, L]; tokens [B, n], row by row from the top left; embeddings [B, L + n, width].

    start word word end | token token token …        the embedding at `end` predicts the first token
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn


class Shape(NamedTuple):
    """What a model is built from, as plain numbers."""

    vocabulary: int  # text ids, with the one that stands for no text
    codes: int
    code_channels: int  # of the first stage
    width: int
    layers: int
    heads: int
    mlp: int
    positions: int  # longest text and image

    @property
    def embedding(self) -> int:
        """Channels of the table of image tokens: two more than a code's, which the export needs (janus.py)."""
        return self.code_channels + 2


class Predicted(NamedTuple):
    """Logits of the text's second to last token [B, L − 1, vocabulary], and of the image's tokens [B, n, codes]."""

    text: torch.Tensor
    image: torch.Tensor


class Dalle(nn.Module):
    """The transformer; its weights have the names that they have in Janus."""

    def __init__(self, shape: Shape) -> None:
        from transformers import JanusVQVAEConfig, LlamaConfig, LlamaModel
        from transformers.models.janus.modeling_janus import JanusVQVAEAlignerMLP, JanusVQVAEHead

        super().__init__()
        self.shape = shape
        self.language_model = LlamaModel(LlamaConfig(**text_config(shape)))
        self.lm_head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        tokens = JanusVQVAEConfig(**token_config(shape))
        self.generation_embeddings = nn.Embedding(shape.codes, shape.embedding)
        self.generation_aligner = JanusVQVAEAlignerMLP(tokens)
        self.generation_head = JanusVQVAEHead(tokens)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor) -> Predicted:
        """Return the logits of each token, given all before it."""
        inputs = torch.cat([self.embed_text(ids), self.embed_tokens(tokens[:, :-1])], dim=1)
        whole = torch.cat([mask, mask.new_ones(len(mask), tokens.shape[1] - 1)], dim=1)
        hidden = self.language_model(inputs_embeds=inputs, attention_mask=whole, use_cache=False).last_hidden_state
        text, image = hidden[:, : ids.shape[1] - 1], hidden[:, ids.shape[1] - 1 :]
        return Predicted(self.lm_head(text), self.generation_head(image))

    def embed_text(self, ids: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.language_model.embed_tokens(ids)
        return embedded

    def embed_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.generation_aligner(self.generation_embeddings(tokens))
        return embedded


def text_config(shape: Shape) -> dict[str, Any]:
    """Return the arguments of the LlamaConfig."""
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": shape.positions,
        "tie_word_embeddings": False,
    }


def token_config(shape: Shape) -> dict[str, Any]:
    """Return the arguments of the JanusVQVAEConfig that concern the transformer."""
    return {
        "num_embeddings": shape.codes,
        "embed_dim": shape.embedding,
        "projection_dim": shape.width,
        "image_token_embed_dim": shape.width,
    }
