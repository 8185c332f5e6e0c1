"""A model → the same model on many workers, and state that knows no world size.

engine, zero: accelerate and DeepSpeed
state → ema, checkpoint: weights and optimizer state, by element
adversary, loss_scale, model_options: training in turns, fp16, memory and speed
"""
