"""The demonstration's other half: what skipping weights does for decoding on the CPU."""

from __future__ import annotations

from larosa.benchmarks.decode import DecodeBenchmark, measure_shape

SPARSITIES = (0.25, 0.5)

SPEED_NOTE = (
    "Weights are random, which takes as long as trained ones. larosa-tiny fits into the processor's cache and so says "
    "little about speed: a large model's time is that of reading its weights from memory."
)


def run_speed_demo() -> list[DecodeBenchmark]:
    """Time the bundled model's shape and three layers of Llama-3.2-1B's, with a small vocabulary."""
    return [
        measure_shape("larosa-tiny", sparsities=SPARSITIES, tokens=64),
        measure_shape("llama-3.2-1b", sparsities=SPARSITIES, layers=3, vocab_size=8192, tokens=32),
    ]
