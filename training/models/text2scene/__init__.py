"""Text → scenes of things, one at a time (Text2Scene, Tan et al. 2019)

Order: config (settings, without torch) → modeling_text2scene (runs without Capstan) → vocabulary → drawer → family.
"""
