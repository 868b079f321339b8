"""What frozen features know of regions, before any LLM: `python -m granvit.eval probe ENCODER... --data DIR`."""
