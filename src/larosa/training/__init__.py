"""Training after conversion."""
