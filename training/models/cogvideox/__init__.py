"""Captioned clips and images → a diffusion transformer over space and time: Sora's form (Brooks et al. 2024)

Order: config (settings, without torch) → model → drawer → family (batches, loss, product).
"""
