"""Training loop, weights, checkpoints and inference for any detector; knows no host."""
