"""Captions and images' tokens → one transformer that writes images as tokens after their captions (Ramesh et al. 2021).

Order: config (settings, without torch) → tokens (a first stage's codes, captions' ids) → model → sampling → drawer →
janus (the export) → family (batches, loss, product).
"""
