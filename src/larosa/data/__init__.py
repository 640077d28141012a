"""Text to calibrate on and to evaluate with, its tokens, and the bundled model."""
