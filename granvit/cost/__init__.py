"""What a run costs: operations, memory and hours, counted before it starts."""
