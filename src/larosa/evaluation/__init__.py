"""What a model lost and what it skips: perplexity, divergence from the dense model, zeros, bytes, FLOPs."""
