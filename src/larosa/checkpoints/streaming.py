"""Models whose decoder layers stay on disk: from the shards of a checkpoint to those of another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from larosa.architectures import find_architecture
from larosa.checkpoints.weight_files import INDEX, StoredWeight, check_loaded, stored_weights
from larosa.errors import LarosaError
from larosa.utils.layer_files import LayerFile, absent, keep_on_disk, layer_file, read_weight

#: In old checkpoints of Llama; transformers has computed them since, and leaves them out too.
_IGNORED = "rotary_emb.inv_freq"


def load_without_layers(path: Path, config: Any, dtype: torch.dtype | None, folder: Path) -> Any:
    """A dense causal language model with all but the matrices of its decoder layers in memory.

    `larosa.utils.layer_files.in_memory` has those, a layer at a time.

    Args:
        path: folder with a checkpoint in safetensors, which must stay as it is meanwhile.
        config: of a supported dense model.
        dtype: of the model; None is the checkpoint's own.
        folder: where changed matrices go.

    Raises:
        LarosaError: weights are missing, unexpected or of another shape, a file is damaged, or nobody says the dtype.
    """
    architecture = find_architecture(config.model_type)
    stored = {name: weight for name, weight in stored_weights(path).items() if not name.endswith(_IGNORED)}
    with torch.device("meta"):
        model: Any = architecture.causal_lm_class(config)
    if config.tie_word_embeddings:
        model.tie_weights()
    architecture.renew_rotary(model)
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    _check_names(path, shapes, stored)
    if (dtype := dtype or config.dtype) is None:
        raise LarosaError(f"{path}: config.json has no key 'dtype': give --dtype")
    model.config.dtype = dtype
    on_disk: set[str] = set()
    for index, (prefix, layer) in enumerate(_layers(model)):
        matrices = [name for name, weight in layer.named_parameters(prefix=prefix) if weight.dim() > 1]
        own_file = folder / f"layer-{index}.safetensors"
        keep_on_disk(layer, LayerFile(prefix, {name: stored[name].file for name in matrices}, own_file))
        on_disk.update(matrices)
    for name, shape in shapes.items():
        weight = absent(shape, dtype) if name in on_disk else read_weight(stored[name].file, name, dtype)
        owner, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(owner), own_name, nn.Parameter(weight, requires_grad=False))
    if config.tie_word_embeddings:
        model.tie_weights()
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def save_with_layers(model: Any, folder: Path, max_shard_size: str) -> None:
    """`save_pretrained` for a model whose layers are on disk, a file each; the model cannot be used any more.

    Raises:
        LarosaError: the disk is full, or cannot be written to.
    """
    layers = _layers(model)
    where: dict[str, Path] = {}
    size = 0
    for index, (_, layer) in enumerate(layers):
        file = folder / f"layer-{index}.safetensors"
        stored = _file_of(layer).hand_over(layer, file)
        where |= dict.fromkeys(stored, file)
        size += sum(stored.values())
    rest = {name: weight for name, weight in model.state_dict().items() if name not in where}
    model.save_pretrained(folder, state_dict=dict(rest), max_shard_size=max_shard_size)  # which empties it
    for name, weight in stored_weights(folder).items():
        where[name] = weight.file
        size += rest[name].nbytes
    (folder / INDEX).unlink(missing_ok=True)
    files = list(dict.fromkeys(where.values()))
    names = {file: f"model-{number:05d}-of-{len(files):05d}.safetensors" for number, file in enumerate(files, 1)}
    for file, name in names.items():
        file.rename(folder / name)
    content = {"metadata": {"total_size": size}, "weight_map": {name: names[file] for name, file in where.items()}}
    (folder / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def _layers(model: Any) -> list[tuple[str, nn.Module]]:
    """The decoder layers, each with its name in the model."""
    names = {module: name for name, module in model.named_modules()}
    return [(names[layer], layer) for layer in find_architecture(model.config.model_type).layers(model)]


def _file_of(layer: nn.Module) -> LayerFile:
    file = layer_file(layer)
    assert file is not None, "the model is streamed"
    return file


def _check_names(path: Path, shapes: Mapping[str, torch.Size], stored: Mapping[str, StoredWeight]) -> None:
    """Refuse a checkpoint that is not of these weights exactly."""
    mismatched = [
        (name, stored[name].shape, tuple(shape))
        for name, shape in shapes.items()
        if name in stored and stored[name].shape != shape
    ]
    missing, unexpected = shapes.keys() - stored.keys(), stored.keys() - shapes.keys()
    check_loaded(str(path), {"mismatched_keys": mismatched, "missing_keys": missing, "unexpected_keys": unexpected})
