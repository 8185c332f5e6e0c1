"""Captions → clips with their sound: one model over both latents, on an image run and a first stage of sounds.

Order: config (settings, without torch) → modeling_audiovideo (runs without Capstan) → drawer → family.
"""
