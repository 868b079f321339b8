"""The trainer: stages, steps, checkpoints, and whole runs of them."""
