"""Images → latents → images: diffusers' AutoencoderKL, a first stage.

Order: config (settings, without torch) → model → lpips, discriminator (losses) → first_stage (shared with vqgan) →
family (batches, product).
"""
