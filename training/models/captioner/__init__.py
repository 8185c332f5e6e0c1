"""Images and captions → CoCa, a model that writes captions.

Order: config (settings, without torch) → model (module, initialisation, losses) → initialize (`train.init`) → family
(batches, product).
"""
