"""Text generation."""

from larosa.decoding.generation import Generation, generate

__all__ = ["Generation", "generate"]
