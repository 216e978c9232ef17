"""The loop and what surrounds it: optimiser, checkpoints, evaluation, report."""
