"""A run of many ranks gone through on one CPU, without weights: `granvit train rehearse`."""
