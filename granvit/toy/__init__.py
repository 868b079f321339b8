"""Tiny models from scratch, and the warm-up on text that makes them speak, for machines without a GPU."""
