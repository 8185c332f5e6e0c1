"""The captioned world moves and sounds: (seed, index) → a scene in time → frames, samples, captions; and back

Lengths and places are those of the still world (pipeline.world.scene). Times are in frames.
"""
