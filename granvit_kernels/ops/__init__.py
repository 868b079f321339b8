"""A package a group of operators, each with CANDIDATES = {operator: {backend: module}} (see backends.py)."""
