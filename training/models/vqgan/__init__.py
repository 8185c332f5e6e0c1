"""Images → codebook entries → images: VQGAN, a first stage (Esser et al. 2021).

Order: config (settings, without torch) → model (module, codebook losses, codebook use) → family (batches, product).
"""
