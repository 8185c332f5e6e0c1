"""Steps of a run → log, trackers, sample grids, evaluations, divergence check.

Order: trackers → loss_by_timestep, flops → metrics_logger → divergence → validation.
"""
