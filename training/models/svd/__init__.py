"""Clips → an image model that continues an image: Stable Video Diffusion (Blattmann et al. 2023)

Order: config (settings, without torch) → noise (EDM preconditioning) → network (what starts from the image run) →
conditions (of an image and a clip) → drawer, with measures → family (batches, loss, product).
"""
