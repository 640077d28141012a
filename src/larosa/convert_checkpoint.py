"""From a dense checkpoint to a converted one: load, convert, measure, save."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from larosa.architectures import find_architecture
from larosa.calibration.sources import BUNDLED
from larosa.checkpoint import LOG_SUFFIX, check_output, find_device, load, load_config, save
from larosa.config import LarosaConfig
from larosa.context import context_length
from larosa.conversion import check_reach, convert
from larosa.errors import LarosaError
from larosa.evaluation.perplexity import Evaluation, RecordedLogits, evaluate_windows, evaluation_windows
from larosa.finite import check_weights
from larosa.memory import peak_memory
from larosa.model_card import model_card
from larosa.rotation import usual_format
from larosa.settings import Settings
from larosa.sparsity import SiteSizes
from larosa.sparsity.report import Sparsity, inspect_config

#: What the card's measurement reads: small, so that the dense logits fit in memory beside the model.
_MEASURED_WINDOWS = 4
_MEASURED_LENGTH = 512


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did and what it cost; `dense` and `sparse` are None where nothing was measured."""

    output: str
    larosa: dict[str, Any]
    sparsity: Sparsity
    dense: Evaluation | None
    sparse: Evaluation | None
    source_bytes: int
    peak_memory_bytes: dict[str, int]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def convert_checkpoint(
    source: str,
    output: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    offload: bool = False,
    trust_remote_code: bool = False,
    measure: bool = True,
    max_shard_size: str = "5GB",
    search_log: Path | None = None,
    **settings: Any,
) -> ConversionReport:
    """Convert a checkpoint into a new folder, which appears only when it is complete.

    Args:
        source: folder or hub name of a dense model.
        output: a folder that does not exist yet.
        offload: keep the model in CPU memory and move one layer at a time to `device`, for models that
            do not fit there; sampling, searches and measurement then run on the CPU.
        measure: compare with the dense model on the bundled text, for the report and the card.
        search_log: where a search keeps its points, so that it can be resumed; by default beside
            `output`. It ends up in `output` as search.jsonl.
        settings: as for `larosa.convert`.

    Raises:
        LarosaError: anything a user can mend; nothing has been written then but the search log.
    """
    started = time.perf_counter()
    check_output(output, max_shard_size)
    # Refuse bad options before a long load.
    completed = Settings.complete(**settings)
    if search_log is not None and not completed.search.keeps_log:
        raise LarosaError("--search-log is of a search: give --search grid or --search sensitivity with it")
    config = load_config(source, trust_remote_code=trust_remote_code)
    check_reach(completed, find_architecture(config.model_type), SiteSizes.of(config))
    target = find_device(device)
    model, tokenizer = load(
        source, dtype=dtype, device="cpu" if offload else str(target), trust_remote_code=trust_remote_code
    )
    check_weights(model)
    source_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    _check_disk(output, model, completed)
    log = search_log or output.with_name(output.name + LOG_SUFFIX)
    dense = sparse = windows = recorded = None
    if measure:
        length = min(_MEASURED_LENGTH, context_length(model.config))
        windows = evaluation_windows(model, tokenizer, BUNDLED, length, _MEASURED_WINDOWS)
        dense = evaluate_windows(model, windows, None)
        recorded = RecordedLogits(model, windows)
    convert(model, tokenizer, device=target, search_log=log, **settings)
    if windows is not None:
        sparse = evaluate_windows(model, windows, recorded)
    block = LarosaConfig.parse(model.config.larosa)
    inspection = inspect_config(model.config)
    save(
        model,
        tokenizer,
        output,
        model_card(output.name, source, block, inspection, dense, sparse),
        max_shard_size,
        source=source,
        trust_remote_code=trust_remote_code,
        log=log if completed.search.keeps_log else None,
    )
    return ConversionReport(
        output=str(output),
        larosa=model.config.larosa,
        sparsity=inspection.sparsity,
        dense=dense,
        sparse=sparse,
        source_bytes=source_bytes,
        peak_memory_bytes=peak_memory(),
        seconds=time.perf_counter() - started,
    )


def _check_disk(output: Path, model: torch.nn.Module, settings: Settings) -> None:
    """Find out that the disk is too full before the work rather than after it."""
    config: Any = model.config
    head = find_architecture(config.model_type).head(model).weight
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    if config.tie_word_embeddings:
        needed += head.numel() * head.element_size()
    sizes, item = SiteSizes.of(config), head.element_size()
    adapters = settings.adapters or usual_format(head.dtype)
    needed += sizes.adapter_bytes(settings.rotation, settings.layers_per_rotation, adapters, item)
    if settings.score.has_vectors:
        needed += sizes.score_entries * item
    free = shutil.disk_usage(output.absolute().parent).free
    if free < needed:
        raise LarosaError(
            f"{output}: no space left on the disk; {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        )
