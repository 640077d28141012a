"""From a dense checkpoint to a converted one: load, convert, measure, save."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from larosa.architectures import find_architecture
from larosa.architectures.context import context_length
from larosa.calibration.sources import SELF
from larosa.checkpoints.card import model_card
from larosa.checkpoints.gguf import find_gguf
from larosa.checkpoints.io import LOG_SUFFIX, check_output, find_device, load, load_config, save
from larosa.config import LarosaConfig, Selection
from larosa.conversion.options import ConversionOptions, ConversionSettings
from larosa.conversion.pipeline import Sparsified, check_reach, sparsify
from larosa.conversion.within import Trial, fewest_bytes
from larosa.errors import LarosaError
from larosa.evaluation.perplexity import Evaluation, RecordedLogits, evaluate_windows, report_windows
from larosa.formats import AdapterFormat, Quantization, WeightFormat
from larosa.sparsity import SiteSizes
from larosa.sparsity.report import Sparsity, inspect_config
from larosa.sparsity.sites import column_bytes
from larosa.utils.finite import check_weights
from larosa.utils.memory import peak_memory
from larosa.utils.progress import stage_seconds

#: `weights` that are chosen together with the sparsity.
AUTO_WEIGHTS = "auto"

_Formats = dict[WeightFormat, Quantization | None]


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did and what it cost; `dense` and `sparse` are None where nothing was measured.

    `tried` is what a search for `max_kl` measured. A token reads `bytes_per_token` of weights, adapters, scores and
    head, of the source `bytes_dense`. `stages` are seconds by what the progress bars say.
    """

    output: str
    larosa: dict[str, Any]
    sparsity: Sparsity
    dense: Evaluation | None
    sparse: Evaluation | None
    tried: list[Trial]
    bytes_per_token: int
    bytes_dense: int
    source_bytes: int
    peak_memory_bytes: dict[str, int]
    seconds: float
    stages: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class SweepPoint:
    """What a sparsity loses, and the bytes that it reads per token, as of `ConversionReport`."""

    sparsity: float
    evaluation: Evaluation
    bytes_per_token: int
    bytes_dense: int

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def convert_checkpoint(
    source: str,
    output: Path,
    *,
    max_shard_size: str = "5GB",
    search_log: Path | None = None,
    **options: Any,
) -> ConversionReport:
    """Convert a checkpoint into a new folder, which appears only when it is complete.

    Args:
        source: folder or hub name of a dense model, or a GGUF file.
        output: a folder that does not exist yet.
        search_log: where a search keeps its points, so that it can be resumed; by default beside
            `output`. It ends up in `output` as search.jsonl.
        options: as for `Conversion`.

    Raises:
        LarosaError: anything a user can mend; nothing has been written then but the search log.
    """
    check_output(output, max_shard_size)
    log = search_log or output.with_name(output.name + LOG_SUFFIX)
    conversion = Conversion(source, [output], search_log=log, log_named=search_log is not None, **options)
    return conversion.save(output, max_shard_size)


def convert_at(
    source: str, outputs: Mapping[float, Path], *, max_shard_size: str = "5GB", **options: Any
) -> Iterator[ConversionReport]:
    """Convert a checkpoint at several sparsities, calibrated once, into a new folder each.

    Each is a checkpoint like any other, which every tool can load as it is; only their counts differ.

    Args:
        outputs: the folders by sparsity. Other arguments are as for `convert_checkpoint`.
    """
    for output in outputs.values():
        check_output(output, max_shard_size)
    conversion = Conversion(source, list(outputs.values()), sparsity=next(iter(outputs)), **options)
    for sparsity, output in outputs.items():
        conversion.set_sparsity(sparsity)
        yield conversion.save(output, max_shard_size)


def sweep(source: str, sparsities: Sequence[float], **options: Any) -> list[SweepPoint]:
    """What a model loses at each of some sparsities, calibrated once; nothing is written.

    Options are as for `Conversion`.
    """
    conversion = Conversion(source, [], sparsity=sparsities[0], **options)
    return [conversion.sweep_point(sparsity) for sparsity in sparsities]


class Conversion:
    """A checkpoint loaded, measured and converted, to be saved or looked at with other sparsities.

    Args:
        source, outputs: where from and where to.
        dtype, device, trust_remote_code: as for `load`.
        offload: keep the model in CPU memory and move one layer at a time to `device`, for models that
            do not fit there; sampling, searches and measurement then run on the CPU.
        streaming: the same with the layers on disk, for models that do not fit into the CPU's memory either: one is
            in memory at a time. It writes one model, and cannot sample from it.
        measure: compare with the dense model on the bundled text.
        max_kl: instead of a sparsity: take the highest whose divergence from the dense model, measured on the bundled
            text, is not above this (nats per token).
        search_log: where a search keeps its points; `log_named` says whether that is the user's own choice.
        options: as for `larosa.convert`; with `max_kl` the `weights` may be `AUTO_WEIGHTS`, for the format that then
            reads the fewest bytes a token. The model is held up to three times over meanwhile.

    Raises:
        LarosaError: anything a user can mend.
    """

    def __init__(
        self,
        source: str,
        outputs: list[Path],
        *,
        dtype: str = "auto",
        device: str = "auto",
        offload: bool = False,
        streaming: bool = False,
        trust_remote_code: bool = False,
        measure: bool = True,
        max_kl: float | None = None,
        search_log: Path | None = None,
        log_named: bool = False,
        **options: Any,
    ) -> None:
        self._started = time.perf_counter()
        # Refuse bad options before a long load.
        if max_kl is not None and not (max_kl > 0 and measure):
            raise LarosaError("--max-kl needs a number above 0, and the measurement: leave --no-measure out")
        auto = options.get("weights") == AUTO_WEIGHTS
        if auto:
            options["weights"] = WeightFormat.INT4  # which needs what any of them does
        asked = ConversionOptions(**options)
        chosen = asked.complete()
        formats = _formats(max_kl, asked, chosen.selection) if auto else None
        if formats is not None and streaming:
            raise LarosaError(
                "--weights auto holds the model several times: leave --streaming out, or name the weights"
            )
        if log_named and not chosen.search.keeps_log:
            raise LarosaError("--search-log is of a search: give --search grid or --search sensitivity with it")
        if streaming:
            _check_streaming(source, chosen, outputs)
        config = load_config(source, trust_remote_code=trust_remote_code)
        check_reach(chosen, find_architecture(config.model_type), SiteSizes.of(config))
        chosen = asked.complete(context_length(config))
        if formats is not None:
            chosen = chosen.model_copy(update={"quantization": None})
        target = find_device(device)
        self._source, self._trust_remote_code = source, trust_remote_code
        self._layer_folder: tempfile.TemporaryDirectory[str] | None = None
        if streaming:  # beside the output, where the layers become its files; else for the time being
            beside = outputs[0].absolute().parent if outputs else None
            self._layer_folder = tempfile.TemporaryDirectory(prefix=".larosa-", dir=beside)
        model, self._tokenizer = load(
            source,
            dtype=dtype,
            device="cpu" if offload else str(target),
            trust_remote_code=trust_remote_code,
            layer_folder=None if self._layer_folder is None else Path(self._layer_folder.name),
        )
        check_weights(model)
        self._bytes_dense = inspect_config(model.config, parameters=False).bytes_per_token
        self._source_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        if outputs:
            _check_disk(outputs[0], model, chosen, len(outputs), streaming)
        self._log = search_log if chosen.search.keeps_log else None
        self._windows = self._recorded = self._dense = None
        self._tried: list[Trial] = []
        with stage_seconds() as self._stages:
            if measure:
                self._windows = report_windows(model, self._tokenizer)
                self._recorded = RecordedLogits(model, self._windows)
                self._dense = evaluate_windows(model, self._windows, None)
            self._converted = sparsify(model, self._tokenizer, chosen, device=target, search_log=self._log)
            if max_kl is not None:
                self._converted, self._tried = fewest_bytes(self._in(formats), self._measure, max_kl)

    def set_sparsity(self, sparsity: float) -> None:
        """See `Sparsified.set_sparsity`."""
        if sparsity != self._converted.model.config.larosa["sparsity"]:
            self._converted.set_sparsity(sparsity)

    def measured(self) -> Evaluation | None:
        """The model as it is now against the dense one; None where nothing is to be measured."""
        return None if self._windows is None else self._measure(self._converted.model)

    def _measure(self, model: Any) -> Evaluation:
        assert self._windows is not None, "something is to be measured"
        return evaluate_windows(model, self._windows, self._recorded)

    def _in(self, formats: _Formats | None) -> Iterator[tuple[WeightFormat, Sparsified]]:
        """The model as it was converted or, where there are formats to try, in one after the other."""
        for weights, quantization in (formats or {}).items():
            yield weights, self._converted if quantization is None else self._converted.stored(quantization)
        if formats is None:
            quantization = LarosaConfig.parse(self._converted.model.config.larosa).quantization
            yield WeightFormat.FULL if quantization is None else quantization.weights, self._converted

    def sweep_point(self, sparsity: float) -> SweepPoint:
        """What the model loses and reads at a sparsity."""
        self.set_sparsity(sparsity)
        evaluation = self.measured()
        assert evaluation is not None, "a sweep measures"
        read = inspect_config(self._converted.model.config, parameters=False).bytes_per_token
        return SweepPoint(sparsity, evaluation, read, self._bytes_dense)

    def save(self, output: Path, max_shard_size: str) -> ConversionReport:
        """Write the model as it is now, and report on it."""
        model, sparse = self._converted.model, self.measured()
        block = LarosaConfig.parse(model.config.larosa)
        inspection = inspect_config(model.config)
        save(
            model,
            self._tokenizer,
            output,
            model_card(output.name, self._source, block, inspection, self._dense, sparse),
            max_shard_size,
            source=self._source,
            trust_remote_code=self._trust_remote_code,
            log=self._log,
        )
        return ConversionReport(
            output=str(output),
            larosa=model.config.larosa,
            sparsity=inspection.sparsity,
            dense=self._dense,
            sparse=sparse,
            tried=self._tried,
            bytes_per_token=inspection.bytes_per_token,
            bytes_dense=self._bytes_dense,
            source_bytes=self._source_bytes,
            peak_memory_bytes=peak_memory(),
            seconds=time.perf_counter() - self._started,
            stages=self._stages,
        )


def _check_streaming(source: str, settings: ConversionSettings, outputs: list[Path]) -> None:
    """Refuse what needs the whole model at once, or what layers cannot be read from one by one."""
    if find_gguf(source) is not None or not Path(source).is_dir():
        raise LarosaError(f"{source}: --streaming reads a local folder of safetensors; hf download NAME makes one")
    if settings.calibration is not None and settings.calibration.source == SELF:
        raise LarosaError(
            "--streaming never has the whole model to sample from: give --calibration a file of text, or wikitext2"
        )
    if len(outputs) > 1:
        raise LarosaError("--streaming writes one model: give one --sparsity")


def _formats(max_kl: float | None, options: ConversionOptions, selection: Selection) -> _Formats:
    """The formats of weights that `AUTO_WEIGHTS` stands for, in the order to try them in."""
    if max_kl is None:
        raise LarosaError("--weights auto takes what reads the fewest bytes within a bound: add --max-kl")
    planes = selection is Selection.THRESHOLD
    return Quantization.choices(options.head, options.weight_group, options.quantizer, planes)


def _check_disk(
    output: Path, model: torch.nn.Module, settings: ConversionSettings, copies: int, streaming: bool
) -> None:
    """Find out that the disk is too full before the work rather than after it."""
    config: Any = model.config
    head = find_architecture(config.model_type).head(model).weight
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    linears = None if settings.quantization is None else settings.quantization.linear_format
    of_head = None if settings.quantization is None else settings.quantization.head_format
    if config.tie_word_embeddings and (settings.rotation.rotates or of_head is not None):
        needed += head.numel() * head.element_size()
    sizes, item = SiteSizes.of(config), head.element_size()
    adapters = settings.adapters or AdapterFormat.usual(head.dtype)
    needed += sizes.adapter_bytes(settings.rotation, settings.layers_per_rotation, adapters, item)
    if settings.score.has_vectors:
        needed += (1 if linears is None else linears.planes) * sizes.score_entries * item
    if not streaming:  # which keeps the merged weights there before it rounds them
        needed -= sizes.linear_bytes(None, item) - sizes.linear_bytes(linears, item)
    needed -= sizes.hidden * (column_bytes([len(head)], None, item) - column_bytes([len(head)], of_head, item))
    needed *= copies
    free = shutil.disk_usage(output.absolute().parent).free
    if free < needed:
        raise LarosaError(
            f"{output}: no space left on the disk; {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        )
