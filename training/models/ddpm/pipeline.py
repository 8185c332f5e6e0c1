"""A diffusers pipeline that draws pixels from text; `capstan export` writes this file next to the weights

    DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)("a red circle").images[0]

It needs diffusers and transformers, not Capstan. diffusers has no pipeline of its own for this network: those for
pixels take no text, or a T5 and two networks.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class TextToPixelsPipeline(DiffusionPipeline):
    """A UNet2DConditionModel on pixels, with a CLIP text encoder and classifier-free guidance."""

    def __init__(self, unet: Any, scheduler: Any, text_encoder: Any, tokenizer: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)

    @torch.no_grad()  # type: ignore[untyped-decorator,unused-ignore]
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Return one image per prompt: PIL images, or float [N, H, W, 3] in 0 … 1 for `output_type="np"`."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        device, unet, guided = self._execution_device, self.unet, guidance_scale > 1
        states = self.encode(prompts)
        if guided:
            negatives = negative_prompt or ""
            without = [negatives] * len(prompts) if isinstance(negatives, str) else negatives
            states = torch.cat([self.encode(without), states])
        side = unet.config.sample_size
        shape = (len(prompts), unet.config.in_channels, side, side)
        image = randn_tensor(shape, generator=generator, device=device, dtype=unet.dtype)
        image = image * self.scheduler.init_noise_sigma
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        kind = type(self.scheduler).__name__
        extra: dict[str, Any] = {} if kind.startswith("DPMSolver") else {"generator": generator}
        if kind == "DDIMScheduler":
            # Guidance drives x0 beyond the range of images. The noise must be that of the clipped x0: otherwise the
            # image moves away from x0 with every step, and a white background comes out black.
            extra["use_clipped_model_output"] = True
        for time in self.progress_bar(self.scheduler.timesteps):
            given = torch.cat([image, image]) if guided else image
            output = unet(given, time, encoder_hidden_states=states).sample
            if guided:
                output = self.guide(output, guidance_scale, image.shape[1])
            image = self.scheduler.step(output, time, image, **extra).prev_sample
        pixels = (image / 2 + 0.5).clamp(0, 1).float().cpu().permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(images=self.numpy_to_pil(pixels) if output_type == "pil" else pixels)

    def encode(self, texts: list[str]) -> torch.Tensor:
        """Return the text encoder's states [N, L, W]."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        states: torch.Tensor = self.text_encoder(tokens.input_ids.to(self._execution_device))[0]
        return states.to(self.unet.dtype)

    @staticmethod
    def guide(output: torch.Tensor, scale: float, channels: int) -> torch.Tensor:
        """Return the guided prediction; a learned variance, in further channels, is that with the prompt."""
        without, with_text = output.chunk(2)
        mean = without[:, :channels] + scale * (with_text[:, :channels] - without[:, :channels])
        return torch.cat([mean, with_text[:, channels:]], dim=1)
