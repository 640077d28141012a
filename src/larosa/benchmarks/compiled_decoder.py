"""The baseline on a GPU: a plain PyTorch decoder with random weights, compiled as a whole into CUDA graphs.

Half precision throughout, one position at a time, the matrices of q/k/v joined: what PyTorch's users do when they want
a single stream to be fast. Gate and up stay apart: where they are joined, the compiler works silu(gate) * up out again
in every program of the product that reads it. The four products of a layer can be replaced, which is how other methods'
kernels are measured in the same decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

from larosa.architectures import Heads
from larosa.decoding.cache import cache_bytes
from larosa.formats import CacheFormat
from larosa.sparsity import SiteSizes

#: Makes the module that multiplies [1, D] by matrices [N_i, D], one for q/k/v together and two for gate and up, which
#: read a site ("h1" to "h4") of a layer. It gives a list [1, N_i]. What it holds must be parameters or buffers: CUDA
#: graphs copy everything else at each step.
Products = Callable[[list[torch.Tensor], int, str], nn.Module]

#: How PyTorch tunes what is beside others' kernels: all that `max-autotune` does but choose among several ways of each
#: loop over elements, which took longer and was no faster (docs/lab/cuda.md).
_BESIDE_OTHERS = {
    "triton.cudagraphs": True,
    "max_autotune_gemm": True,
    "coordinate_descent_tuning": True,
}

#: Decoders that may be compiled side by side, two for each sparsity; by itself PyTorch gives up after eight.
_MOST_DECODERS = 64


class DenseProducts(nn.Module):
    """All of the matrices, one after the other: the compiler joins products, and what follows them, where it pays."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in weights)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x W^T for each."""
        return [F.linear(x, weight) for weight in self.weights]


def _dense(weights: list[torch.Tensor], layer: int, site: str) -> nn.Module:
    return DenseProducts(weights)


@dataclass(frozen=True)
class _Sizes:
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    queries: int
    keys: int
    head: int
    eps: float
    theta: float
    length: int

    @classmethod
    def of(cls, config: Any, length: int) -> _Sizes:
        heads = Heads.of(config)
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            vocabulary=config.vocab_size,
            queries=heads.keys * heads.group,
            keys=heads.keys,
            head=heads.size,
            eps=config.rms_norm_eps,
            theta=float((config.rope_parameters or {}).get("rope_theta", 10000.0)),
            length=length,
        )


#: Attention [1, K, G, d] of queries [1, K, G, d] over keys and values [1, K, T, d] where a mask [1, 1, 1, T] is true.
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def attend_at_once(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention by PyTorch's kernel for it."""
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


def attend_by_products(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Attention by two products and a softmax, which leave more for the GPU to do side by side."""
    scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1, dtype=torch.float32)
    return weights.to(values.dtype) @ values


class _Layer(nn.Module):
    """Pre-norm attention and gated MLP over a static cache."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, sizes: _Sizes, index: int, products: Products, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.sizes = sizes
        heads = (sizes.queries + 2 * sizes.keys) * sizes.head
        shapes = {
            "h1": [(heads, sizes.hidden)],
            "h2": [(sizes.hidden, sizes.queries * sizes.head)],
            "h3": [(sizes.intermediate, sizes.hidden)] * 2,
            "h4": [(sizes.hidden, sizes.intermediate)],
        }
        self.products = nn.ModuleDict(
            {
                site: products([_random(shape, dtype, device) for shape in matrices], index, site)
                for site, matrices in shapes.items()
            }
        )
        self.first_norm, self.second_norm = (_gain(sizes, dtype, device) for _ in range(2))
        cache = (1, sizes.keys, sizes.length, sizes.head)
        self.register_buffer("keys", torch.zeros(cache, dtype=dtype, device=device))
        self.register_buffer("values", torch.zeros(cache, dtype=dtype, device=device))

    def forward(
        self,
        x: torch.Tensor,
        position: torch.Tensor,
        mask: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention: Attention,
    ) -> torch.Tensor:
        sizes = self.sizes
        (qkv,) = self.products["h1"](_rms_norm(x, self.first_norm, sizes.eps))
        q, k, v = qkv.view(1, 1, -1, sizes.head).transpose(1, 2).split([sizes.queries, sizes.keys, sizes.keys], dim=1)
        q, k = (_rotate(part, cos, sin) for part in (q, k))
        self.keys[:, :, position] = k
        self.values[:, :, position] = v
        # Queries that share keys as if they were positions of one head: the cache is not repeated for each of them.
        attended = attention(q.reshape(1, sizes.keys, -1, sizes.head), self.keys, self.values, mask)
        (output,) = self.products["h2"](attended.reshape(1, -1))
        x = x + output
        gate, up = self.products["h3"](_rms_norm(x, self.second_norm, sizes.eps))
        (output,) = self.products["h4"](F.silu(gate) * up)
        return x + output


class CompiledDecoder(nn.Module):
    """A decoder of a configuration's shape, its weights random.

    Args:
        config: of a Llama-like model.
        length: positions of its cache.
        dtype: of everything.
        device: of everything.
        products: makes the products of its layers; dense ones by default.
        head: makes that of its language-model head, for which the site is "head".
    """

    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self,
        config: Any,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        products: Products = _dense,
        head: Products = _dense,
    ) -> None:
        super().__init__()
        self.sizes = sizes = _Sizes.of(config, length)
        self.embedding = nn.Parameter(_random((sizes.vocabulary, sizes.hidden), dtype, device), requires_grad=False)
        self.layers = nn.ModuleList(_Layer(sizes, i, products, dtype, device) for i in range(sizes.layers))
        self.norm = _gain(sizes, dtype, device)
        self.head = head([_random((sizes.vocabulary, sizes.hidden), dtype, device)], sizes.layers, "head")
        self.eps = sizes.eps
        self.register_buffer("positions", torch.arange(length, device=device))
        exponents = torch.arange(0, sizes.head, 2, device=device) / sizes.head
        angles = torch.outer(self.positions.float(), sizes.theta**-exponents).repeat(1, 2)
        self.register_buffer("cos", angles.cos().to(dtype))
        self.register_buffer("sin", angles.sin().to(dtype))

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """What may be the fastest. Where queries share keys, PyTorch's kernel has few heads to work on side by side."""
        shared = self.sizes.queries > self.sizes.keys
        return (attend_at_once, attend_by_products) if shared else (attend_at_once,)

    def forward(
        self, token: torch.Tensor, position: torch.Tensor, attention: Attention = attend_at_once
    ) -> torch.Tensor:
        """Logits [1, V] of the token after `token` [1] int64, which stands at `position` [1] int64."""
        x = F.embedding(token, self.embedding)
        mask = (self.positions <= position)[None, None, None]
        cos, sin = self.cos[position], self.sin[position]
        for layer in self.layers:
            x = layer(x, position, mask, cos, sin, attention)
        (logits,) = self.head(_rms_norm(x, self.norm, self.eps))
        return logits


def decoder_bytes(config: Any, length: int, dtype: torch.dtype) -> int:
    """What the weights and the cache of a `CompiledDecoder` take; it never shares the embedding with the head."""
    sizes = SiteSizes.of(config)
    weights = (sizes.linear_weights + 2 * sizes.vocabulary * sizes.hidden) * dtype.itemsize
    return weights + cache_bytes(config, CacheFormat(dtype), length)


def compiled_step(
    decoder: CompiledDecoder, attention: Attention = attend_at_once, opaque: bool = False
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A step from token to next token [1], greedily, compiled with CUDA graphs and tuned kernels.

    `opaque` says that the products are operators which PyTorch's compiler neither chooses nor sees into.

    Every decoder is compiled for its own thresholds and attention: PyTorch would make arguments of those that differ
    from the decoder before, and leaves CUDA graphs out where an argument is on the CPU.
    """

    def step(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return decoder(token, position, attention).argmax(dim=-1)

    how: dict[str, Any] = {"options": _BESIDE_OTHERS} if opaque else {"mode": "max-autotune"}
    compiled: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.compile(
        step, fullgraph=True, dynamic=False, **how
    )
    return compiled


@contextmanager
def compilation() -> Iterator[None]:
    """Has PyTorch compile what first runs within, as many decoders as there are, without telling of each choice."""
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    quiet = {"max_autotune_report_choices_stats": False, "autotune_num_choices_displayed": 0}
    with dynamo.patch(recompile_limit=_MOST_DECODERS), inductor.patch(quiet):
        yield


def _random(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device).normal_(std=1 / math.sqrt(shape[1]))


def _gain(sizes: _Sizes, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.ones(sizes.hidden, dtype=dtype, device=device), requires_grad=False)


def _rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * gain


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
