"""A model → the same model on many workers; checkpoints for any world size

engine, optimizer, zero: accelerate and DeepSpeed
state → ema, checkpoint: weights and optimizer state, by element
adversary, loss_scale, model_options: adversarial training, fp16, memory and speed
"""
