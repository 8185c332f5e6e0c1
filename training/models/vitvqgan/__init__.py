"""Images → codes → images by transformers: ViT-VQGAN, a first stage (Yu et al. 2022).

Order: config (settings, without torch) → modeling_vitvqgan (runs without Capstan) → family (trainable module, product).
"""
