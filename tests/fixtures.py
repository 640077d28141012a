"""Fixtures of all tests: tiny random models of every family, a word tokenizer and text for it."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.smollm3.modeling_smollm3 import SmolLM3RMSNorm

import larosa
from larosa.architectures import cache_argument

# Handing a tiny model's work to a second thread costs far more than the work, in commands that tests start too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

VOCABULARY = 128
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# Each family with what sets it apart switched on: biases, sliding windows, odd head sizes, layers without RoPE.
_FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": 8, "head_dim": 8}),
    "qwen2": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, {"head_dim": 16, "attention_bias": True}),
    "smollm3": (SmolLM3Config, {"no_rope_layer_interval": 2, "attention_bias": True, "mlp_bias": True}),
}
_NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, SmolLM3RMSNorm)


def _family_config(model_type: str, **overrides: Any) -> Any:
    config_class, own = _FAMILIES[model_type]
    return config_class(**{**_SIZES, **own, **overrides})


def _make_model(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    model = AutoModelForCausalLM.from_config(_family_config(model_type, **overrides), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.3 * noise)  # gains of exactly 1 would hide a forgotten fold
            elif name.endswith("bias"):
                weight.copy_(0.3 * noise)
            else:
                weight.copy_(noise / math.sqrt(weight.shape[1]))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def families() -> tuple[str, ...]:
    return tuple(_FAMILIES)


@pytest.fixture(scope="session")
def family_config() -> Callable[..., Any]:
    """family_config(model_type, **overrides): a tiny configuration of a family."""
    return _family_config


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """make_model(model_type, dtype, seed, **overrides): a tiny dense model, every parameter random."""
    return _make_model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Word `wN` is token N, so that a test can write down any token ids it likes."""
    vocabulary = {word: i for i, word in enumerate([*_SPECIAL, *(f"w{i}" for i in range(len(_SPECIAL), VOCABULARY))])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def words() -> Callable[..., str]:
    """words(count, seed): random text of exactly `count` tokens."""

    def make(count: int, seed: int = 0) -> str:
        chance = random.Random(seed)
        return " ".join(f"w{chance.randrange(len(_SPECIAL), VOCABULARY)}" for _ in range(count))

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, words: Callable[..., str]) -> Path:
    """4 windows of 32 tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(words(4 * 32), "utf-8")
    return path


@pytest.fixture(scope="session")
def quick_convert(tokenizer: Any, text_file: Path) -> Callable[..., Any]:
    """quick_convert(model, **options): convert, calibrated on `text_file`."""

    def convert(model: Any, **options: Any) -> Any:
        short = {"calibration": str(text_file), "num_sequences": 4, "sequence_length": 32}
        # Every token is sparse, so that tests can count; those of the first token ask for it.
        options = {**short, "dense_first_token": False, **options}
        if options.get("method", "larosa") == "larosa":
            options.setdefault("rotation", "layer")  # with every part that a converted model can have
            options.setdefault("selection", "top-k")
        return larosa.convert(model, tokenizer, **options)

    return convert


@pytest.fixture(scope="session")
def token_ids() -> Callable[..., torch.Tensor]:
    """token_ids(*shape, seed): random token ids."""

    def make(*shape: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(len(_SPECIAL), VOCABULARY, shape, generator=generator)

    return make


class _RoundedCache(DynamicCache):
    """Keys and values of 8 bits, rounded as soon as they are there."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().update(_rounded(keys), _rounded(values), *args, **kwargs)


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """To a whole number of times a 127th of each vector's largest magnitude, which is itself rounded to bfloat16."""
    scale = (x.abs().amax(dim=-1, keepdim=True) / 127).bfloat16().to(x.dtype)
    return torch.where(scale == 0, 0, (x / scale).round().clamp(-127, 127) * scale)


@pytest.fixture(scope="session")
def rounded_cache() -> type[DynamicCache]:
    return _RoundedCache


@pytest.fixture(scope="session")
def rounded_logits() -> Callable[..., torch.Tensor]:
    """rounded_logits(model, ids, prompt): the forward's from the prompt's last token on, with a cache of 8 bits.

    The prompt attends to its own keys and values as they are.
    """

    @torch.inference_mode()
    def run(model: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
        past, cache = DynamicCache(), _RoundedCache()
        rows = [model(ids[:, :prompt], **cache_argument(model, past)).logits[:, -1]]
        for index, layer in enumerate(past.layers):
            cache.update(layer.keys, layer.values, index)
        for at in range(prompt, ids.shape[1]):
            rows.append(model(ids[:, at : at + 1], **cache_argument(model, cache)).logits[:, -1])
        return torch.cat(rows)

    return run


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """RMSNorm in the input's precision: transformers computes it in float32 even in a float64 model,

    whose rounding would drown what the float64 tests compare. It applies to source and converted models alike.
    """

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    for norm in _NORMS:
        monkeypatch.setattr(norm, "forward", forward)
