"""Gran datasets: schema, loader, the embedded sample set, converters, packed batches."""
