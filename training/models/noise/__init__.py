"""Diffusion in general: objectives, noise processes, samplers, and drawing by a diffusers pipeline.

Order: settings, schedulers → objectives, process → drawer. The families that denoise something share it.
"""
