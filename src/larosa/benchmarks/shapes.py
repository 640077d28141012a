"""Models of known shapes with random weights: what they compute is noise, what they read is real."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.initialization import no_init_weights

from larosa.architectures import find_architecture
from larosa.calibration import SortedMagnitudes
from larosa.config import (
    Budget,
    HeadThreshold,
    LarosaConfig,
    PerSite,
    Recipe,
    Rotation,
    Score,
    Search,
    Selection,
    Thresholds,
    check_layers_per_rotation,
)
from larosa.data.bundled import bundled_model
from larosa.errors import LarosaError
from larosa.formats import Adapter, AdapterFormat, Quantization, Quantizer, WeightFormat
from larosa.models import (
    Int8Adapter,
    QuantizedLinear,
    Threshold,
    empty_model,
    family_of,
    head_selector,
    selectors,
    set_adapter,
    set_keep_counts,
)
from larosa.parallel import Over, Ranks, empty_shard, shard_of, whole_config
from larosa.parallel.shard import adapter_parts, tie_head
from larosa.sparsity import SiteSizes, keep_counts
from larosa.sparsity.prices import no_thresholds
from larosa.version import __version__


def _shape(
    config_class: type[Any],
    sizes: tuple[int, int, int],
    heads: tuple[int, int, int],
    vocabulary: int,
    **other: Any,
) -> Callable[[], Any]:
    (hidden, intermediate, layers), (queries, keys, size) = sizes, heads
    return lambda: config_class(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=queries,
        num_key_value_heads=keys,
        head_dim=size,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **{"tie_word_embeddings": False, **other},
    )


_TIED = {"tie_word_embeddings": True}

#: Configurations by name: (hidden, intermediate, layers), (query heads, key heads, head size), vocabulary.
SHAPES: dict[str, Callable[[], Any]] = {
    "llama-2-7b": _shape(LlamaConfig, (4096, 11008, 32), (32, 32, 128), 32000),
    "llama-3-8b": _shape(LlamaConfig, (4096, 14336, 32), (32, 8, 128), 128256),
    "llama-3-70b": _shape(LlamaConfig, (8192, 28672, 80), (64, 8, 128), 128256),
    "llama-3.2-1b": _shape(LlamaConfig, (2048, 8192, 16), (32, 8, 64), 128256, **_TIED),
    "llama-3.2-3b": _shape(LlamaConfig, (3072, 8192, 28), (24, 8, 128), 128256, **_TIED),
    "mistral-7b": _shape(MistralConfig, (4096, 14336, 32), (32, 8, 128), 32768, sliding_window=None),
    "qwen2.5-0.5b": _shape(Qwen2Config, (896, 4864, 24), (14, 2, 64), 151936, **_TIED),
    "qwen2.5-1.5b": _shape(Qwen2Config, (1536, 8960, 28), (12, 2, 128), 151936, **_TIED),
    "qwen2.5-7b": _shape(Qwen2Config, (3584, 18944, 28), (28, 4, 128), 152064),
    "qwen3-0.6b": _shape(Qwen3Config, (1024, 3072, 28), (16, 8, 128), 151936, **_TIED),
    "qwen3-1.7b": _shape(Qwen3Config, (2048, 6144, 28), (16, 8, 128), 151936, **_TIED),
    "qwen3-8b": _shape(Qwen3Config, (4096, 12288, 36), (32, 8, 128), 151936),
    "smollm3-3b": _shape(SmolLM3Config, (2048, 11008, 36), (16, 4, 128), 128256, **_TIED),
    "larosa-tiny": lambda: AutoConfig.from_pretrained(bundled_model()),
}

#: Elements of random numbers that fill all weights, over and over. A prime: rows of a matrix begin at different places.
_BLOCK = 1_000_003

#: What rounding to 4 bits leaves of a weight, about.
_NEXT_PLANE = 0.1

#: Random tokens by which thresholds are set.
_TOKENS = 128


def shape_config(name: str, *, layers: int | None = None, vocab_size: int | None = None) -> Any:
    """The configuration of a shape in `SHAPES`, or of a cut of it.

    Raises:
        LarosaError: there is no such shape, or it has no such cut.
    """
    if name not in SHAPES:
        raise LarosaError(f"unknown shape '{name}': one of {', '.join(SHAPES)}")
    config = SHAPES[name]()
    if layers is not None:
        if not 0 < layers <= config.num_hidden_layers:
            raise LarosaError(f"--layers {layers}: {name} has {config.num_hidden_layers}")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[:layers]
    if vocab_size is not None:
        if vocab_size < 1:
            raise LarosaError(f"--vocab-size must be at least 1, not {vocab_size}")
        config.vocab_size = vocab_size
    return config


@dataclass(frozen=True)
class Layout:
    """Where a random model has adapters, after so many layers each, and how it stores them; by default as `convert`.

    Linears and head are in the model's dtype, or in few bits where `quantization` says so.
    """

    layers_per_rotation: int = 1
    adapters: AdapterFormat | None = None  # None: what suits the model's dtype
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        check_layers_per_rotation(self.layers_per_rotation)

    @property
    def planes(self) -> int:
        """Columns of the linears that an entry of an activation may read."""
        return 1 if self.quantization is None else self.quantization.weights.planes

    def stored(self, dtype: torch.dtype) -> AdapterFormat:
        """How a model of this dtype stores them."""
        return self.adapters or AdapterFormat.usual(dtype)


DEFAULT_LAYOUT = Layout()


def shape_name(name: str, layers: int | None, layout: Layout, ranks: Ranks | None = None) -> str:
    """What rows call a shape: its name, and what differs from the whole shape as it is converted by default."""
    cut = "" if layers is None else f", {layers} layers"
    shared = "" if layout.layers_per_rotation == 1 else f", {layout.layers_per_rotation} layers per rotation"
    stored = "" if layout.adapters is None else f", {layout.adapters} adapters"
    return name + cut + shared + stored + ranks_name(ranks)


def ranks_name(ranks: Ranks | None) -> str:
    """What rows add to a name where several ranks run the model."""
    if ranks is None:
        return ""
    return f", {ranks.size} ranks" + (", each with its own Top-K" if ranks.over is Over.OWN else "")


def random_quantization(weights: WeightFormat, group: int | None = None) -> Quantization | None:
    """Linears of few bits, and the head that they have by default, for a random model. None for `full`.

    Args:
        group: outputs that share a scale; None for what suits the format.

    Raises:
        LarosaError: so many cannot share one, or there are no scales.
    """
    few = weights is not WeightFormat.FULL
    return Quantization.complete(weights, None, group, Quantizer.RTN if few else None)


def random_model(
    config: Any, dtype: torch.dtype, device: torch.device, seed: int = 0, ranks: Ranks | None = None
) -> Any:
    """A dense model of a configuration, its weights random numbers of the usual size, or a rank's shard of one."""
    if ranks is not None:
        shard = empty_shard(config, dtype, ranks)
        _fill(shard, seed)
        if config.tie_word_embeddings:
            tie_head(shard)
        return shard
    with no_init_weights(), device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if config.tie_word_embeddings:
        model.tie_weights()
    _fill(model, seed)
    return model.eval().requires_grad_(False)


def random_sparse_model(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    *,
    layout: Layout = DEFAULT_LAYOUT,
    selection: Selection = Selection.TOP_K,
    rotation: Rotation = Rotation.LAYER,
    ranks: Ranks | None = None,
    like: Any = None,
) -> Any:
    """The same as LaRoSA converts it: adapters between rotations, a score at each site. Keeps everything.

    Args:
        like: a model of the same configuration, or a rank's shard of one, whose weights it takes for its own.
    """
    block = _block(config, dtype, layout, selection, rotation)
    own = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    own |= {"tie_word_embeddings": False, "larosa": block.model_dump(mode="json")}
    config = family_of(find_architecture(config.model_type)).config_class.from_dict(own)
    shared = {} if like is None else dict(like.named_parameters())
    model = empty_model(config, dtype, device, shared) if ranks is None else empty_shard(config, dtype, ranks, shared)
    _fill(model, seed, {id(weight) for weight in shared.values()})
    return model


def _block(config: Any, dtype: torch.dtype, layout: Layout, selection: Selection, rotation: Rotation) -> LarosaConfig:
    """The settings of a random model that keeps everything."""
    sizes = SiteSizes.of(config)
    if layout.planes > 1:
        selection = Selection.THRESHOLD  # also where nothing is skipped
    in_planes = layout.quantization is not None and layout.quantization.head.planes > 1
    counts = selection is Selection.TOP_K
    everything = _counts(sizes, 0.0) if counts else {"thresholds": no_thresholds(sizes, head=in_planes)}
    return LarosaConfig(
        larosa_version=__version__,
        recipe=Recipe.BEST,
        sparsity=0.0,
        budget=Budget.WEIGHTS,
        rotation=rotation,
        layers_per_rotation=layout.layers_per_rotation,
        adapters=layout.stored(dtype) if rotation.has_adapters else AdapterFormat.FULL,
        score=Score.WEIGHTS,
        search=Search.NONE,
        quantization=layout.quantization,
        **everything,
    )


def random_dense_model(
    config: Any, dtype: torch.dtype, device: torch.device, layout: Layout, ranks: Ranks | None = None
) -> Any:
    """The dense model with linears and head stored as a layout says, without adapters."""
    alike = replace(layout, layers_per_rotation=1)
    return random_sparse_model(config, dtype, device, layout=alike, rotation=Rotation.NONE, ranks=ranks)


def sparse_copies(sparsities: tuple[float, ...]) -> int:
    """How many models `sparse_models` makes."""
    return any(sparsities) + (0.0 in sparsities)


def sparse_models(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    sparsities: tuple[float, ...],
    layout: Layout = DEFAULT_LAYOUT,
    selection: Selection = Selection.TOP_K,
    ranks: Ranks | None = None,
    like: Any = None,
) -> Iterator[tuple[float, Any]]:
    """`random_sparse_model` at one sparsity after the other, each to be made an engine of before the next is asked for.

    They share their weights, which these engines lay out by columns; but where nothing is skipped the CPU's engine
    reads by rows, so that 0 has a model of its own.

    Args:
        like: a model that all share their weights with, for a GPU: its engines read all weights by columns.
    """

    def make() -> Any:
        options: dict[str, Any] = {"layout": layout, "selection": selection, "ranks": ranks, "like": like}
        return random_sparse_model(config, dtype, device, **options)

    made: dict[bool, Any] = {}
    for sparsity in sparsities:
        skips = like is not None or sparsity > 0
        if skips not in made:
            made[skips] = make()
        if skips:
            set_sparsity(made[skips], sparsity)
        yield sparsity, made[skips]


def set_sparsity(model: Any, sparsity: float) -> None:
    """Let a sparsified random model skip another fraction of its weights, the same at each site."""
    shard, now = shard_of(model), LarosaConfig.parse(whole_config(model).larosa)
    if now.selection is Selection.THRESHOLD:
        limits: dict[str, Any] = {"thresholds": _calibrate(model, sparsity)}
    else:
        limits = _counts(SiteSizes.of(whole_config(model)), sparsity)
    block = now.model_copy(update={"sparsity": sparsity, **limits})
    if shard is not None:
        shard.set_limits(model, block)
    elif block.keep is not None:
        set_keep_counts(model, find_architecture(model.config.model_type), block.keep)
    if shard is None:
        model.config.larosa = block.model_dump(mode="json")


def _counts(sizes: SiteSizes, sparsity: float) -> dict[str, Any]:
    return {"keep": keep_counts(sparsity, PerSite(), sizes)}


@torch.no_grad()
def _calibrate(model: Any, sparsity: float) -> Thresholds:
    """Set thresholds that this share of random tokens' entries is not above, with all that comes before sparse too."""
    architecture = find_architecture(model.config.model_type)
    chosen = selectors(model, architecture)
    dropped: dict[str, list[float]] = {site: [] for site in chosen}

    def calibrate(selector: Any, x: torch.Tensor) -> float:
        seen = SortedMagnitudes((selector.copies(x) * selector.score).abs().flatten().sort().values)
        selector.threshold = seen.threshold(sparsity)
        return seen.dropped(selector.threshold)

    def hook(site: str) -> Callable[[Any, Any], None]:
        return lambda selector, inputs: dropped[site].append(calibrate(selector, inputs[0]))

    hooks = [selector.register_forward_pre_hook(hook(site)) for site, of_site in chosen.items() for selector in of_site]
    try:
        tokens = torch.randint(model.config.vocab_size, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
        hidden = architecture.decoder(model)(tokens.to(model.device), use_cache=False).last_hidden_state
    finally:
        for handle in hooks:
            handle.remove()
    of_head, head = head_selector(model, architecture), None
    if of_head is not None:
        share = calibrate(of_head, hidden)
        head = HeadThreshold(value=of_head.threshold, dropped=share)
    return Thresholds(
        values={site: [selector.threshold for selector in of_site] for site, of_site in chosen.items()},
        dropped=dropped,
        head=head,
    )


@torch.no_grad()
def _fill(model: Any, seed: int, others: Collection[int] = ()) -> None:
    """Fill every parameter: norm gains and scores with numbers near 1, the rest with columns of length about 1.

    Args:
        others: ids of parameters that stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(_BLOCK, generator=generator)
    adapters = [module for module in model.modules() if isinstance(module, Int8Adapter)]
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    quantized = [linear for linear in quantized if id(linear.codes) not in others]
    filled = {id(parameter) for adapter in adapters for parameter in adapter.parameters()}
    filled |= {id(parameter) for linear in quantized for parameter in (linear.codes, linear.scales)}
    filled |= set(others)
    for weight in model.parameters():
        if id(weight) not in filled:
            part = block[: weight.numel()]
            _repeat(part / math.sqrt(weight.shape[1]) if weight.dim() > 1 else 1 + 0.1 * part, weight)
    for linear in quantized:
        form = linear.format
        whole = torch.randint(form.lowest, form.highest + 1, (1, 2 * _BLOCK), generator=generator)
        _repeat(form.pack(whole)[0], linear.codes)
        length = float(whole.double().square().mean().sqrt())
        # Of either sign: codes alone have a mean, which every layer would add to the stream and the next multiply.
        signs = torch.randint(2, block.shape, generator=generator) * 2 - 1
        _repeat(signs * (1 + 0.1 * block) / (length * math.sqrt(linear.in_features)), linear.scales)
        for plane, scales in enumerate(linear.scales.chunk(form.planes)):
            scales *= _NEXT_PLANE**plane
    for selector in model.modules():
        if isinstance(selector, Threshold) and selector.score is not None:
            for plane, score in enumerate(selector.score.chunk(selector.planes)):
                score *= _NEXT_PLANE**plane
    if adapters:
        one, shard = random_adapter(len(adapters[0].scale), model.dtype, AdapterFormat.INT8, seed), shard_of(model)
        if shard is not None:
            parts = adapter_parts(adapters[0], shard.ranks)
            one = replace(one, weight=torch.cat([one.weight[part] for part in parts], dim=1))
        for adapter in adapters:
            set_adapter(adapter, one)


def _repeat(numbers: torch.Tensor, weight: torch.Tensor) -> None:
    """Fill a weight with these numbers, over and over."""
    numbers = numbers.to(weight)
    for piece in weight.view(-1).split(len(numbers)):
        piece.copy_(numbers[: len(piece)])


def random_adapter(width: int, dtype: torch.dtype, adapters: AdapterFormat, seed: int = 0) -> Adapter:
    """What takes vectors of so many entries to others of their length, for a model of this dtype."""
    generator = torch.Generator().manual_seed(seed)
    R = torch.randn(width, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
    return adapters.storage.pack(R, dtype)
