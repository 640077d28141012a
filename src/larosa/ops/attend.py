"""Attention of a position a row over static caches, with all that happens to queries and keys before it."""

from __future__ import annotations

import torch

from larosa.formats.keys_values import round_vectors
from larosa.ops.norm import rms_norm_reference
from larosa.ops.schema import define


@define(
    "attend(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor position, Tensor? cos, Tensor? sin, "
    "Tensor? q_gain, Tensor? k_gain, float eps, float scale, int window, Tensor(c!)? scales=None, "
    "Tensor? cache=None) -> Tensor"
)
def _attend(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    q_gain: torch.Tensor | None,
    k_gain: torch.Tensor | None,
    eps: float,
    scale: float,
    window: int,
    scales: torch.Tensor | None = None,
    cache: torch.Tensor | None = None,
) -> torch.Tensor:
    heads, _, size = keys.shape[-3:]
    return qkv.new_empty(len(qkv), qkv.shape[1] - 2 * heads * size)


def attend_reference(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    q_gain: torch.Tensor | None,
    k_gain: torch.Tensor | None,
    eps: float,
    scale: float,
    window: int,
    scales: torch.Tensor | None = None,
    cache: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norm and rotate the queries and keys of a position a row, store keys and values, and attend up to the position.

    Query heads share key heads group by group: query head h reads key head h // (H / K). All rows' keys and values are
    stored first, so that rows of one cache see those before them.

    Args:
        qkv: [B, (H + 2 K) d] float32 (float64 for a reference): H query heads, K key heads, K value heads.
        keys: [K, T, d] in the dtype of the cache, int8 with `scales`; place `position` is written. With `cache`
            [C, K, T, d].
        values: likewise.
        position: [B] int64 in [0, T), on the device of the others. Rows of one cache have different ones.
        cos: [T, d] float32, the rotary embedding of every position; None for a layer without one.
        sin: [T, d] float32, likewise. Rotation is by halves: x cos + (-x_2, x_1) sin.
        q_gain: [d], gain of an RMSNorm over each query head before the rotation; None for no norm.
        k_gain: [d], likewise for the key heads.
        eps: of those norms.
        scale: multiplies the scores q k.
        window: positions attended to, this one included; 0 for all.
        scales: [K, T, 2] bfloat16, by which int8 keys (first) and values (second) are multiplied; place `position` is
            written, as `round_vectors` has it. None for a cache of floats. With `cache` [C, K, T, 2].
        cache: [B] int64 in [0, C), which of several caches each row is of; None where there is one.

    Returns:
        [B, H d] like `qkv`.
    """
    size = keys.shape[-1]
    heads = keys.shape[-3]
    of_row: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
    queries = []
    for row, at in enumerate(position.tolist()):
        number = ... if cache is None else int(cache[row])
        stored, factors = (keys[number], values[number]), None if scales is None else scales[number]
        q, k, v = qkv[row].split([qkv.shape[1] - 2 * heads * size, heads * size, heads * size])
        q, k, v = (part.view(-1, size) for part in (q, k, v))
        q = q if q_gain is None else rms_norm_reference(q, q_gain, eps)
        k = k if k_gain is None else rms_norm_reference(k, k_gain, eps)
        if cos is not None and sin is not None:
            q, k = (x * cos[at].to(x.dtype) + _turned(x) * sin[at].to(x.dtype) for x in (q, k))
        for which, x in enumerate((k, v)):
            if factors is None:
                stored[which][:, at] = x.to(keys.dtype)
            else:
                stored[which][:, at], factors[:, at, which] = round_vectors(x)
        of_row.append((*stored, factors))
        queries.append(q)
    outputs = [qkv.new_empty(0, qkv.shape[1] - 2 * heads * size)]
    for q, (*entries, factors), at in zip(queries, of_row, position.tolist(), strict=True):
        seen = slice(max(0, at + 1 - window) if window else 0, at + 1)
        read = [x[:, seen].to(q.dtype) for x in entries]
        if factors is not None:
            read = [x * factors[:, seen, which, None].to(q.dtype) for which, x in enumerate(read)]
        seen_keys, seen_values = (x.repeat_interleave(len(q) // heads, dim=0) for x in read)
        weights = torch.softmax(scale * torch.einsum("hd,htd->ht", q, seen_keys), dim=-1)
        outputs.append(torch.einsum("ht,htd->hd", weights, seen_values).reshape(1, -1))
    return torch.cat(outputs)


def _turned(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
