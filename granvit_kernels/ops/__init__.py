"""One package a group of operators; each has CANDIDATES = {operator: {backend: module}} for granvit_kernels.backends."""
