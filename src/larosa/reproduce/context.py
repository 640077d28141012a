"""What all experiments share: the model, the tokens, the dense reference, and measurements kept on disk."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from larosa.architectures import find_architecture
from larosa.architectures.context import context_length
from larosa.calibration import LayerMoments, layer_second_moments
from larosa.calibration.sources import SELF, calibration_sequences
from larosa.checkpoints.io import find_device, load, load_config
from larosa.config import HEAD, SITES, Budget, Method, PerSite, Rotation
from larosa.conversion import Sparsified, sparsify
from larosa.conversion.options import RECIPES, ConversionOptions
from larosa.data.text import TextSplit, read_text
from larosa.errors import LarosaError
from larosa.evaluation.perplexity import (
    DEFAULT_SEQUENCE_LENGTH,
    Evaluation,
    evaluate_windows,
    evaluation_windows,
    prompt_tokens,
)
from larosa.formats import ColumnFormat, Quantization, Quantizer
from larosa.models import set_keep_counts
from larosa.quantizers import quantize_linears
from larosa.reproduce import paper
from larosa.reproduce.cache import Cache, fingerprint
from larosa.reproduce.settings import MAIN_SPARSITY, SPARSITIES, ReproduceSettings
from larosa.reproduce.variants import LAROSA, TOPK_GS, Variant
from larosa.sparsity import SiteSizes, complete_alphas, keep_counts
from larosa.sparsity.report import element_size, inspect_config
from larosa.sparsity.search import GRID
from larosa.utils.progress import track

#: Dense logits up to so many bytes are recorded; beyond, the dense model stays in memory beside the other.
_RECORDED_BYTES = 4 * 2**30

Logits = Callable[[torch.Tensor], torch.Tensor]


class Context:
    """A model and settings to measure under.

    Models are loaded when something has to be measured, so that a run whose measurements are all on disk
    loads none; at most one sparsified model is held at a time, and a copy of it by few bits.
    """

    def __init__(self, path: str, settings: ReproduceSettings, cache: Path) -> None:
        """Look at the model's configuration and the texts.

        Raises:
            LarosaError: no such model or text, one that is converted already, or sizes that do not suit it.
        """
        self.path = path
        self.settings = settings
        self.config = load_config(path, trust_remote_code=settings.trust_remote_code)
        if str(self.config.model_type).startswith("larosa_"):
            raise LarosaError(f"{path}: converted already; reproduce starts from the dense model")
        self.architecture = find_architecture(self.config.model_type)
        self.sizes = SiteSizes.of(self.config)
        self.paper = paper.find(self.config)
        longest = self.config.max_position_embeddings
        self.sequence_length = settings.sequence_length or min(DEFAULT_SEQUENCE_LENGTH, longest)
        if self.sequence_length > longest:
            raise LarosaError(f"--sequence-length {self.sequence_length} is over the model's context of {longest}")
        self.device = str(find_device(settings.device))
        self.fingerprint = fingerprint(path, self.config)
        self._cache = Cache(cache, self.fingerprint)
        self._digests: dict[tuple[str, TextSplit], str] = {}
        self._references: dict[str, Logits] = {}
        self._sequences: dict[tuple[str, int], torch.Tensor] = {}
        self._held: tuple[Any, Any] | None = None
        self._few_bits: tuple[Variant, Sparsified] | None = None
        self._loaded_tokenizer: Any = None
        for source in (settings.calibration, *settings.other_calibration):
            self.digest(source, TextSplit.TRAIN)
        self.digest(settings.data, TextSplit.TEST)

    # What measurements depend on.

    @property
    def evaluated(self) -> str:
        """The evaluated tokens, for a title."""
        source = Path(self.settings.data)
        name = "/".join(source.parts[-2:]) if len(source.parts) > 1 else source.name
        prompt = f", the first {self.prompt_length} of each a dense prompt" if self.prompt_length else ""
        return f"up to {self.settings.max_sequences} x {self.sequence_length} tokens of {name}{prompt}"

    def digest(self, source: str, split: TextSplit) -> str:
        """A hash of a text source; what a model samples from itself follows from the model."""
        key = (source, split)
        if key not in self._digests:
            text = SELF if source == SELF else read_text(source, split)
            self._digests[key] = hashlib.sha256(text.encode()).hexdigest()
        return self._digests[key]

    @property
    def number_format(self) -> dict[str, str]:
        """What every measurement with the model depends on."""
        return {"dtype": self.settings.dtype, "device": torch.device(self.device).type}

    def calibration_key(self, source: str | None = None, seed: int | None = None) -> dict[str, Any]:
        """What the calibration sample follows from."""
        return {
            "text": self.digest(source or self.settings.calibration, TextSplit.TRAIN),
            "num_sequences": self.settings.num_sequences,
            "sequence_length": self.sequence_length,
            "seed": self.settings.seed if seed is None else seed,
        }

    @property
    def evaluation_key(self) -> dict[str, Any]:
        """What the evaluated tokens follow from."""
        return {
            "text": self.digest(self.settings.data, TextSplit.TEST),
            "sequence_length": self.sequence_length,
            "max_sequences": self.settings.max_sequences,
            "prompt_length": self.prompt_length,
        }

    @property
    def prompt_length(self) -> int:
        """Tokens of each evaluated window that run dense, as a prompt, and are not scored."""
        return prompt_tokens(self.settings.protocol, None, self.sequence_length)

    def measure(self, kind: str, settings: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A measurement from disk, or made now and kept; `settings` is what it depends on beside the model."""
        return self._cache.get(kind, {**self.number_format, **settings}, run)

    def log(self, kind: str, settings: dict[str, Any]) -> Path:
        """A file for what a long measurement has so far; `settings` is what it depends on beside the model."""
        return self._cache.log(kind, {**self.number_format, **settings})

    # Models and tokens.

    def dense(self) -> Any:
        """The dense model, not to be changed; only until the next sparsified one is asked for."""
        return self._hold("dense", self._load)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, remembering the last text, which may be long."""
        if self._loaded_tokenizer is None:
            self.dense()
        return self._loaded_tokenizer

    @cached_property
    def windows(self) -> torch.Tensor:
        """The evaluated tokens, [number, length]."""
        like = SimpleNamespace(config=self.config)
        return evaluation_windows(
            like, self.tokenizer, self.settings.data, self.sequence_length, self.settings.max_sequences
        )

    def basis_key(self, variant: Variant) -> dict[str, Any]:
        """What the activations of the evaluated tokens in a variant's basis follow from."""
        return {**self.variant_key(variant, 0.0, PerSite()), "evaluation": self.evaluation_key}

    def calibration(self, source: str | None = None, seed: int | None = None) -> torch.Tensor:
        """The calibration tokens, [number, length]."""
        source = source or self.settings.calibration
        seed = self.settings.seed if seed is None else seed
        if (source, seed) not in self._sequences:
            self._sequences[source, seed] = calibration_sequences(
                source,
                self.dense() if source == SELF else SimpleNamespace(config=self.config),
                self.tokenizer,
                num_sequences=self.settings.num_sequences,
                sequence_length=self.sequence_length,
                seed=seed,
            )
        return self._sequences[source, seed]

    def moments(self, source: str, seed: int) -> list[LayerMoments]:
        """Each layer's second moments over a calibration sample, on the CPU."""
        sequences, model = self.calibration(source, seed), self.dense()
        device = torch.device(self.device)
        found = layer_second_moments(model, self.architecture, sequences, device)
        return [
            LayerMoments(*(moment.cpu() for moment in layer))
            for layer in track(found, "Second moments", total=self.sizes.layers)
        ]

    def sparsified(self, variant: Variant, sparsity: float, alphas: PerSite | None = None) -> Any:
        """The model sparsified by a variant; what differs in counts alone is converted once.

        Args:
            alphas: coefficients; None is the variant's own.
        """
        if variant.of_one_sparsity:
            return self._hold((variant, sparsity), lambda: self._convert(variant, sparsity)).model
        alphas = alphas or self.alphas(variant)
        converted = self._converted(variant)
        if variant.shares_out_counts:
            converted.set_sparsity(sparsity)
        else:
            set_keep_counts(converted.model, self.architecture, keep_counts(sparsity, alphas, self.sizes))
        return converted.model

    def _converted(self, variant: Variant) -> Sparsified:
        """A variant whose sparsity can be set; those that differ in how weights are stored are converted once."""
        if variant.stored and variant.in_full.is_calibrated:
            in_full = self._converted(variant.in_full)
            if self._few_bits is None or self._few_bits[0] != variant:
                self._few_bits = None  # free the other one first
                unstored = variant.unstored
                group = None if unstored is None else unstored.group
                quantization = Quantization.complete(variant.weights, variant.head, group, variant.quantizer)
                assert quantization is not None, "stored by few bits"
                stored = in_full.stored(quantization)
                if unstored is not None:
                    where = stored.sequences, stored.device
                    quantize_linears(stored.model, self.architecture, unstored, Quantizer.GPTQ, *where)
                self._few_bits = (variant, stored)
            return self._few_bits[1]
        bare = (variant.method, *variant.options.values(), variant.search, variant.calibration, variant.seed)
        converted: Sparsified = self._hold(bare, lambda: self._convert(variant, MAIN_SPARSITY))
        return converted

    def release(self) -> None:
        """Let go of the models in memory: something else needs the room."""
        self._held = self._few_bits = None
        self.__dict__.pop("_resident", None)

    def _hold(self, key: Any, make: Callable[[], Any]) -> Any:
        if self._held is None or self._held[0] != key:
            self._held = self._few_bits = None  # free the others first
            self._held = (key, make())
        return self._held[1]

    def _load(self) -> Any:
        settings = self.settings
        model, tokenizer = load(
            self.path, dtype=settings.dtype, device=self.device, trust_remote_code=settings.trust_remote_code
        )
        if self._loaded_tokenizer is None:
            self._loaded_tokenizer = _Remembering(tokenizer)
        return model

    def _convert(self, variant: Variant, sparsity: float) -> Sparsified:
        model = self._load()
        options = ConversionOptions(
            method=variant.method,
            sparsity=sparsity,
            budget=Budget.WEIGHTS,
            calibration=variant.calibration or self.settings.calibration,
            num_sequences=self.settings.num_sequences,
            sequence_length=self.sequence_length,
            seed=self.settings.seed if variant.seed is None else variant.seed,
            search=variant.search,
            alphas=self.alphas(variant) if variant.searched and variant.of_one_sparsity else None,
            **variant.options,
        )
        settings = options.complete(context_length(self.config))
        return sparsify(model, self.tokenizer, settings, device=self.device)

    # Measurements that several experiments share.

    def evaluate_dense(self) -> dict[str, Any]:
        """The dense model on the evaluated tokens."""

        def run() -> dict[str, Any]:
            model = self.dense()
            return self._summary(model, evaluate_windows(model, self.windows, None, prompt_length=self.prompt_length))

        return self.measure("dense", {"evaluation": self.evaluation_key}, run)

    def evaluate(self, variant: Variant, sparsity: float, alphas: PerSite | None = None) -> dict[str, Any]:
        """A variant at a sparsity on the evaluated tokens: divergence from dense, perplexity, real zeros."""
        alphas = alphas or self.alphas(variant)

        def run() -> dict[str, Any]:
            reference = self.reference(self.windows)
            model = self.sparsified(variant, sparsity, alphas)
            found = evaluate_windows(model, self.windows, reference, prompt_length=self.prompt_length)
            return self._summary(model, found, variant.unstored)

        key = {**self.variant_key(variant, sparsity, alphas), "evaluation": self.evaluation_key}
        return self.measure("evaluation", key, run)

    def variant_key(self, variant: Variant, sparsity: float, alphas: PerSite) -> dict[str, Any]:
        """What a sparsified model follows from; labels do not matter, nor does calibration where it has none."""
        key: dict[str, Any] = {"method": variant.method, "sparsity": sparsity, "alphas": alphas.model_dump()}
        if variant.method is Method.LAROSA:
            key |= {**variant.options, "allocation": variant.allocation}
            key |= {"rotation_seed": self.settings.seed if variant.seed is None else variant.seed}
        if variant.recipe is not None:
            key["parts"] = asdict(RECIPES[variant.recipe])
        if variant.stored:
            key["stored"] = variant.stored
        if variant.unstored is not None:
            key["unstored"] = [variant.unstored.name, variant.unstored.group]
        if variant.is_calibrated:
            key["calibration"] = self.calibration_key(variant.calibration, variant.seed)
        return key

    def alphas(self, variant: Variant) -> PerSite:
        """A variant's coefficients: all 1, or the best of a grid at the main sparsity by perplexity.

        The grid is searched twice, without rotation and for LaRoSA; other rotations take LaRoSA's point, so that
        they differ in nothing else.
        """
        if not variant.searched:
            return PerSite()
        searched = TOPK_GS if variant.rotation is Rotation.NONE else LAROSA
        return best_point(self.grid(searched), "perplexity")[0]

    def grid(self, variant: Variant) -> list[tuple[PerSite, dict[str, Any]]]:
        """Algorithm 1's points for a variant at the main sparsity, each scored on some calibration sequences.

        Points that would ask a site for more than all of its entries at the highest sparsity are left out, so
        that the coefficients found hold at every sparsity.
        """
        points = []
        for alpha1 in GRID:
            for alpha3 in GRID:
                alphas = complete_alphas(alpha1, alpha3, Budget.WEIGHTS, self.sizes)
                if all(0 <= alphas[site] * max(SPARSITIES) <= 1 for site in SITES):
                    points.append(alphas)

        def run(alphas: PerSite) -> dict[str, Any]:
            sequences = self.calibration(variant.calibration, variant.seed)[: self.settings.search_sequences]
            reference = self.reference(sequences)
            model = self.sparsified(variant, MAIN_SPARSITY, alphas)
            found = evaluate_windows(model, sequences, reference)
            return {"perplexity": found.perplexity, "kl": found.kl_divergence}

        scored = []
        for alphas in track(points, f"Grid search, {variant.label}"):
            key = self.variant_key(variant, MAIN_SPARSITY, alphas)
            key |= {
                "calibration": self.calibration_key(variant.calibration, variant.seed),
                "search_sequences": self.settings.search_sequences,
            }
            scored.append((alphas, self.measure("grid", key, partial(run, alphas))))
        return scored

    def reference(self, windows: torch.Tensor) -> Logits:
        """The dense model's logits of each of `windows`, recorded where they fit."""
        key = token_digest(windows)
        if key not in self._references:
            item = (self.config.dtype or torch.float32).itemsize
            if windows.numel() * self.config.vocab_size * item > _RECORDED_BYTES:
                self._references[key] = lambda ids: _logits(self._resident, ids)  # whichever it is then
            else:
                self._references[key] = _Recorded(self.dense(), windows)
        return self._references[key]

    def _summary(self, model: Any, found: Evaluation, unstored: ColumnFormat | None = None) -> dict[str, Any]:
        """What is kept of an evaluation, with all bytes as they are in the checkpoint's own number format.

        `decoder_bytes` are what a token reads of the decoder, `bytes` the same as a share of dense, `file_bytes` what
        all weights take. Linears in an `unstored` format count as if it were stored.
        """
        config, comparison = copy.deepcopy(model.config), found.comparison
        config.dtype = self.config.dtype
        costs = inspect_config(config)
        linears = costs.bytes_dense_total
        if unstored is not None:
            linears = self.sizes.linear_bytes(unstored, element_size(config))
        skipped = found.actual_sparsity.mean if found.actual_sparsity else 0.0
        of_head = found.zeros[HEAD].mean if found.zeros and HEAD in found.zeros else 0.0
        read = (1 - skipped) * linears + costs.adapter_bytes + costs.score_bytes
        return {
            "perplexity": found.perplexity,
            "kl": found.kl_divergence,
            "kl_stderr": comparison and comparison.kl_divergence.mean.stderr,
            "top1": found.top1_agreement,
            "tokens": found.tokens,
            "skipped": found.actual_sparsity and asdict(found.actual_sparsity),
            "weight_bits": 8 * linears / self.sizes.linear_weights,
            "decoder_bytes": read,
            "head_bytes": costs.head_bytes * (1 - of_head),
            "file_bytes": costs.parameter_bytes and costs.parameter_bytes + linears - costs.bytes_dense_total,
            "bytes": read / self.sizes.linear_bytes(None, element_size(self.config)),
            "sites": {site: asdict(spread) for site, spread in (found.zeros or {}).items()},
        }

    @cached_property
    def _resident(self) -> Any:
        """The dense model beside the other, until it is released."""
        return self._load()


def best_point(points: list[tuple[PerSite, dict[str, Any]]], by: str) -> tuple[PerSite, dict[str, Any]]:
    """The point of a grid with the lowest `perplexity` or `kl`; the first of equals."""
    return min(points, key=lambda point: float(point[1][by]))


@torch.inference_mode()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(ids.to(model.get_input_embeddings().weight.device), use_cache=False).logits
    return logits


class _Recorded:
    """Logits of a model, kept on the CPU in its dtype and found again by the tokens they are of."""

    def __init__(self, model: Any, windows: torch.Tensor) -> None:
        rows = track(windows, "Dense logits")
        self._logits = {token_digest(window[None]): _logits(model, window[None]).cpu() for window in rows}

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return self._logits[token_digest(ids)]


def token_digest(ids: torch.Tensor) -> str:
    """A hash of token ids, int64."""
    return hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()


class _Remembering:
    """A tokenizer that keeps its last long answer: conversions ask for the same calibration text over and over."""

    def __init__(self, tokenizer: Any) -> None:
        self.plain = tokenizer
        self._answers: dict[str, Any] = {}

    def __call__(self, text: Any, **options: Any) -> Any:
        if not isinstance(text, str) or set(options) != {"verbose"}:
            return self.plain(text, **options)
        key = hashlib.sha256(text.encode()).hexdigest()
        if key not in self._answers:
            self._answers[key] = self.plain(text, **options)
        return self._answers[key]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)
