"""Generated images and their prompts → metric values.

Order: samples (prompts with true images) → metric (the interface) → oracle, clip_score, fid; mmd → kid, cmmd; ceiling.
"""
