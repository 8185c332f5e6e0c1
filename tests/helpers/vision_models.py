"""Image-text-to-text models of transformers with random weights, in folders as save_pretrained writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WORDS = "describe the red circle on a grey background, write one short caption of this image; user: assistant: system"


def llava(folder: Path) -> Path:
    """One size for all images: four patches each."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = _tokenizer("<image>")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=_text(LlamaConfig, tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )
    return _save(LlavaForConditionalGeneration, config, processor, folder)


def qwen2_vl(
    folder: Path,
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    sizes: dict[str, Any] | None = None,
    **where: Any,
) -> Path:
    """Images in their own sizes: the larger, the more tokens. `text`, `vision` and `sizes` replace the tiny shape."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = _tokenizer("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    tiny = {"embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "patch_size": 7}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1]}
    config = Qwen2VLConfig(
        vision_config=vision or tiny,
        text_config=_text(None, tokenizer) | {"rope_parameters": rope} | (text or {}),
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    sizes = sizes or {"patch_size": 7, "size": {"shortest_edge": 14 * 14, "longest_edge": 70 * 70}}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**sizes),
        tokenizer,
        Qwen2VLVideoProcessor(**sizes),
        chat_template=CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return _save(Qwen2VLForConditionalGeneration, config, processor, folder, **where)


def language_model(folder: Path) -> Path:
    """One that takes no images."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}assistant: "
    )
    return _save(LlamaForCausalLM, _text(LlamaConfig, tokenizer), tokenizer, folder)


def _tokenizer(*special: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = ["<pad>", "<s>", "</s>", *special]
    trainer = trainers.BpeTrainer(vocab_size=300 + len(names), special_tokens=names, initial_alphabet=alphabet)
    bpe.train_from_iterator([WORDS] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def _text(config: Any, tokenizer: Any) -> Any:
    """The language model's shape."""
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    return shape if config is None else config(**shape)


def _save(
    model_class: Any,
    config: Any,
    processor: Any,
    folder: Path,
    *,
    device: str = "cpu",
    dtype: Any = None,
    std: float = 0.4,
) -> Path:
    """Write a model of random weights, made on `device` as `dtype` (None: fp32)."""
    import torch

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device(device):
            model = model_class(config)
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std)  # far apart logits, so that captions vary
    model.generation_config.eos_token_id = config.get_text_config().eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
