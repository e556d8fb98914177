"""What a training step takes: memory and time."""
