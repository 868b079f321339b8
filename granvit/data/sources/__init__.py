"""Converters from other formats to a Gran dataset, one a file."""
