"""Captioned images → generators that attend to words (AttnGAN, Xu et al. 2018).

Order: config (settings, without torch) → discriminators → drawer → family. The generators' own file is
damsm/modeling_attngan.py, which runs without Capstan.
"""
