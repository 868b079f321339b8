"""A page in the browser to try a model, or any encoder: `python -m granvit.demo RUN_OR_MODEL`."""
