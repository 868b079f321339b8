"""What is asked of a picture, and how questions stand in a sequence: what model, data and trainer agree about."""
