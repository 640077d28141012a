"""What the model is calibrated on, and the statistics taken of its activations."""

from larosa.calibration.fisher import LayerFisher, layer_fisher
from larosa.calibration.head import head_scores
from larosa.calibration.layers import LayerVisit, decoder_outputs, visit_layers
from larosa.calibration.moments import LayerMoments, LayerStatistics, layer_second_moments, layer_statistics
from larosa.calibration.observers import Magnitudes, SortedMagnitudes, attached, behind
from larosa.calibration.precision import float32_arithmetic
from larosa.calibration.sources import calibration_sequences

__all__ = [
    "LayerFisher",
    "LayerMoments",
    "LayerStatistics",
    "LayerVisit",
    "Magnitudes",
    "SortedMagnitudes",
    "attached",
    "behind",
    "calibration_sequences",
    "decoder_outputs",
    "float32_arithmetic",
    "head_scores",
    "layer_fisher",
    "layer_second_moments",
    "layer_statistics",
    "visit_layers",
]
