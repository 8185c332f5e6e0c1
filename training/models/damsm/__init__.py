"""Captioned images → DAMSM, which says how well an image and its caption fit, word by word (Xu et al. 2018).

Order: config (settings, without torch) → modeling_attngan (runs without Capstan: this model, and AttnGAN's) → losses →
family.
"""
