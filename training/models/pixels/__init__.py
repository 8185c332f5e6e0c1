"""What families of diffusion in pixels share: settings, noise, variance, networks, loss.

Order: settings (without torch) → variance, process → unet → family (the base of ddpm and imagen).
"""
