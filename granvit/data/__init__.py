"""Gran datasets: schema, loader, the embedded sample set, converters, questions and packing."""
