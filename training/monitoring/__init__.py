"""What is seen of a run while it trains.

settings.py     the recipe's section
trackers/       TensorBoard, Weights & Biases, MLflow
bands.py        a loss told apart by timestep
flops.py        operations of a step, counted; what a device can do; MFU
inloop.py       grids of samples, evaluations, and the best state
"""
