"""What a reproduction is asked to measure on, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from larosa.calibration.sources import SELF
from larosa.data.text import BUNDLED
from larosa.decoding import CacheDtype
from larosa.errors import LarosaError
from larosa.evaluation.perplexity import Protocol

#: The paper's model-level sparsities (Table 2).
SPARSITIES = (0.25, 0.40, 0.50, 0.60)

#: Where coefficients are searched for and single sparsities are shown; the searched coefficients then hold
#: at every sparsity, as the paper's Table 11 has one set a model.
MAIN_SPARSITY = 0.50

#: The paper's output lengths (Figure 4).
LENGTHS = (128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class ReproduceSettings:
    """The options of `larosa reproduce`.

    `sequence_length` is of calibration and evaluation alike; None is 2048, or the model's context where that
    is shorter. By `protocol` evaluation runs every token sparse or the first half of each window dense, and then scores
    the other half alone. `search_sequences` of the calibration sequences score a grid search's points. `task_data` is a
    folder of task files, without which tasks are downloaded; `limit` is the number of items of each task, `samples` of
    answers to each problem of Table 4, each of at most `max_new_tokens`. `lengths` are the numbers of tokens that are
    decoded where speed is measured, `kv_cache_dtype` is how the engine keeps keys and values there. `llama_cpp` is a
    file of benchmarks/llamacpp/quality.py, whose rows stand beside those of `frontier`.
    """

    data: str = BUNDLED
    calibration: str = SELF
    other_calibration: tuple[str, ...] = ()
    num_sequences: int = 16
    sequence_length: int | None = None
    max_sequences: int = 128
    protocol: Protocol = Protocol.ALL
    search_sequences: int = 4
    task_data: Path | None = None
    limit: int | None = None
    samples: int = 4
    max_new_tokens: int = 32768
    lengths: tuple[int, ...] = LENGTHS
    kv_cache_dtype: CacheDtype = CacheDtype.AUTO
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    llama_cpp: Path | None = None

    def __post_init__(self) -> None:
        for name in (
            "num_sequences",
            "max_sequences",
            "search_sequences",
            "limit",
            "samples",
            "max_new_tokens",
            "sequence_length",
        ):
            value = getattr(self, name)
            least = 2 if name == "sequence_length" else 1
            if value is not None and value < least:
                raise LarosaError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        if not self.lengths or min(self.lengths) < 2:
            raise LarosaError("--lengths must be at least 2 each, and at least one of them")
        if self.task_data is not None and not self.task_data.is_dir():
            raise LarosaError(f"{self.task_data}: no such folder (--task-data)")
        if self.llama_cpp is not None and not self.llama_cpp.is_file():
            raise LarosaError(f"{self.llama_cpp}: no such file (--llama-cpp)")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**fields, **{name: fields[name] and str(fields[name]) for name in ("task_data", "llama_cpp")}}
