"""Images → codes → images: a discrete VAE trained through Gumbel-softmax, a first stage (Ramesh et al. 2021).

Order: config (settings, without torch) → model (module, relaxation, logit-Laplace) → family (batches, loss, product).
"""
