"""What the model is calibrated on, and the statistics taken of its activations."""

from larosa.calibration.moments import LayerMoments, layer_second_moments
from larosa.calibration.sources import TextSplit, calibration_sequences, read_text

__all__ = ["LayerMoments", "TextSplit", "calibration_sequences", "layer_second_moments", "read_text"]
