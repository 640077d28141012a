"""What a model is calibrated on: its own text, or that of a named source, a file or a folder."""

from __future__ import annotations

from typing import Any

import torch

from larosa.calibration.self_sampling import sample_sequences
from larosa.data.text import TextSplit, read_text, tokenize
from larosa.errors import LarosaError

SELF = "self"


def calibration_sequences(
    source: str, model: Any, tokenizer: Any, *, num_sequences: int, sequence_length: int, seed: int
) -> torch.Tensor:
    """Token sequences from a calibration source.

    Args:
        source: `self` (sampled from the model), `wikitext2`, `alpaca`, `c4`, `bundled`, or the path
            of a .txt, .json or .jsonl file or of a folder of them.
        num_sequences: how many.
        sequence_length: tokens in each.
        seed: of the sampling, or of the choice of windows.

    Returns:
        [num_sequences, sequence_length] int64 on the CPU.

    Raises:
        LarosaError: unknown source, unreadable or too short text, or token ids that the model lacks.
    """
    if source == SELF:
        return sample_sequences(model, num_sequences, sequence_length, seed)
    ids = tokenize(read_text(source, TextSplit.TRAIN), tokenizer, model.config.vocab_size)
    windows = len(ids) // sequence_length
    if windows == 0:
        raise LarosaError(
            f"calibration source '{source}' has {len(ids)} tokens, less than one sequence of {sequence_length}: "
            "lower --sequence-length or give more text"
        )
    if windows < num_sequences:
        raise LarosaError(
            f"calibration source '{source}' has {len(ids)} tokens, but {num_sequences} x {sequence_length} "
            f"are asked for: lower --num-sequences to {windows} or --sequence-length"
        )
    chosen = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:num_sequences]
    return ids[: windows * sequence_length].view(windows, sequence_length)[chosen]
