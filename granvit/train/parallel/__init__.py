"""Ranks, compilation and memory: how a step runs on the machines there are."""
