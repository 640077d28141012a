"""Checkpoints: what is looked at before it is trusted, loading, saving, GGUF files, cards."""
