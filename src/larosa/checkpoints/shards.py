"""Loading of a checkpoint's shards: each rank reads of the files what is its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig

from larosa.architectures import Architecture, find_architecture
from larosa.checkpoints.gguf import find_gguf
from larosa.checkpoints.io import LoadedModel, check_dtype, load_config, loading, quiet_transformers
from larosa.checkpoints.tokenizer_files import check_tokenizer_files
from larosa.checkpoints.weight_files import check_dtypes, check_loaded, check_weight_files, weight_files
from larosa.config import SITES
from larosa.errors import LarosaError
from larosa.models import QuantizedLinear
from larosa.models.families import model_class
from larosa.parallel.ranks import Ranks
from larosa.parallel.shard import (
    SHARDED,
    Shard,
    TopKOfAll,
    adapter_parts,
    adapters_of,
    empty_shard,
    tie_head,
)

_HEAD = "lm_head.weight"
_STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def load_shard(
    path: str,
    ranks: Ranks,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """One rank's shard of a dense or converted model, of which no more than that is read.

    Args:
        path: folder or hub name.
        dtype: as of `larosa.load`.

    Raises:
        LarosaError: as `larosa.load` does; a GGUF file, an older format, or a model that so many ranks cannot share.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    check_dtype(dtype)
    if find_gguf(path) is not None:
        raise LarosaError(f"{path}: a GGUF file is not read in shards: convert it first, in a process of its own")
    folder = Path(path)
    with loading(path):
        if not folder.is_dir():
            folder = Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
        else:
            check_tokenizer_files(folder)
        stored = check_weight_files(folder)
        wanted = _dtype(dtype, config, stored)
        with quiet_transformers():
            model = empty_shard(config, wanted, ranks)
            model.generation_config = _generation_config(path, model)
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    check_loaded(path, _differences(folder, config))
    check_dtypes(path, model, stored)
    _fill(model, folder)
    return LoadedModel(model, tokenizer)


def _dtype(name: str, config: Any, stored: Mapping[str, str]) -> torch.dtype:
    """What the model is loaded in: as it is asked for, the configuration says, or the weights are."""
    if name != "auto":
        asked: torch.dtype = getattr(torch, name)
        return asked
    own: torch.dtype | None = config.dtype
    return own or next((_STORED[kind] for kind in stored.values() if kind in _STORED), torch.float32)


def _generation_config(path: str, model: Any) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:  # there is none
        own: GenerationConfig = model.generation_config
        return own


def _differences(folder: Path, config: Any) -> dict[str, Any]:
    """What the files lack, have too much or in another shape than the whole model, for `check_loaded`."""
    with torch.device("meta"):
        whole = model_class(config)(config)
    expected = {name: tuple(weight.shape) for name, weight in whole.named_parameters()}
    found: dict[str, tuple[int, ...]] = {}
    for name in weight_files(folder):
        with safe_open(folder / name, framework="pt") as file:
            found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a dict
    ignored = [*(whole._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    if config.tie_word_embeddings:
        expected.pop(_HEAD, None)  # it is the embedding
        ignored.append(f"^{re.escape(_HEAD)}$")
    return {
        "mismatched_keys": [(n, found[n], shape) for n, shape in expected.items() if found.get(n, shape) != shape],
        "missing_keys": expected.keys() - found.keys(),
        "unexpected_keys": {
            name for name in found.keys() - expected.keys() if not any(re.search(each, name) for each in ignored)
        },
    }


class Pieces(NamedTuple):
    """What a rank has of a stored weight: pieces, side by side along a dimension; zeros where there are none."""

    at: list[tuple[slice, ...]]
    dim: int = -1


_WHOLE = Pieces([()])


@torch.no_grad()
def _fill(model: Any, folder: Path) -> None:
    """Read a shard's weights."""
    architecture, shard = find_architecture(model.config.model_type), model.larosa_shard
    pieces = shard_pieces(model, architecture, shard)
    weights = dict(model.named_parameters())
    tied = architecture.head(model).weight if shard.whole.tie_word_embeddings else None
    for name in weight_files(folder):
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                weight = weights.get(key)
                if weight is None or weight is tied:
                    continue
                parts = pieces.get(key, _WHOLE)
                if parts == _WHOLE:
                    weight.copy_(file.get_tensor(key))
                elif parts.at:
                    whole = file.get_slice(key)
                    weight.copy_(torch.cat([whole[part] for part in parts.at], dim=parts.dim))
                else:
                    weight.zero_()
    if tied is not None:
        tie_head(model)


def shard_pieces(model: Any, architecture: Architecture, shard: Shard) -> dict[str, Pieces]:
    """What a shard has of each stored weight, by name; what is not listed it has whole."""
    names = {id(module): name for name, module in model.named_modules()}
    ranks, found = shard.ranks, dict[str, Pieces]()
    for layer in architecture.layers(model):
        for site in SITES:
            for linear in architecture.linears(layer, site):
                name = names[id(linear)]
                if site in SHARDED:
                    total = shard.whole.intermediate_size if site == "h4" else linear.in_features * ranks.size
                    inputs = _of_each_plane(ranks.part(total), total, linear)
                    found |= _columns(name, linear, inputs)
                    if linear.bias is not None and not ranks.first:
                        found[f"{name}.bias"] = Pieces([])
                    if not isinstance(getattr(linear, "selector", None), TopKOfAll):
                        found[f"{name}.selector.score"] = Pieces([(part,) for part in inputs])
                else:
                    total = shard.whole.intermediate_size if site == "h3" else linear.out_features * ranks.size
                    found |= _rows(name, linear, ranks.part(total))
        for adapter in adapters_of(layer).values():
            found[f"{names[id(adapter)]}.weight"] = Pieces(list(adapter_parts(adapter, ranks)))
    head = architecture.head(model)
    return found | _rows(names[id(head)], head, shard.vocabulary)


def _of_each_plane(inputs: slice, total: int, linear: Any) -> list[slice]:
    """Where a rank's inputs out of so many stand in each plane of a linear."""
    planes = linear.format.planes if isinstance(linear, QuantizedLinear) else 1
    return [slice(plane * total + inputs.start, plane * total + inputs.stop) for plane in range(planes)]


def _columns(name: str, linear: Any, inputs: list[slice]) -> dict[str, Pieces]:
    """Of a linear that reads so much of a site."""
    if isinstance(linear, QuantizedLinear):
        by_rows = Pieces([(part, slice(None)) for part in inputs], dim=0)
        return {f"{name}.codes": by_rows, f"{name}.scales": by_rows}
    return {f"{name}.weight": Pieces([(slice(None), part) for part in inputs])}


def _rows(name: str, linear: Any, outputs: slice) -> dict[str, Pieces]:
    """Of a linear that gives so much of what it gives whole."""
    found = {f"{name}.bias": Pieces([(outputs,)])}
    if not isinstance(linear, QuantizedLinear):
        return found | {f"{name}.weight": Pieces([(outputs, slice(None))])}
    form = linear.format
    codes = slice(form.codes_width(outputs.start), form.codes_width(outputs.stop))
    scales = slice(outputs.start // form.group, form.groups(outputs.stop))
    parts = {f"{name}.{part}": Pieces([(slice(None), own)]) for part, own in (("codes", codes), ("scales", scales))}
    return found | parts
