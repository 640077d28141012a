"""What llama.cpp is given to be measured on: files read back, and models that compute the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from larosa.checkpoints.gguf import GgufFile, load_gguf_config

pytest.importorskip("gguf")
FOLDER = Path(__file__).parents[2] / "benchmarks" / "llamacpp"


@pytest.fixture
def gguf_files(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gguf_files

    yield gguf_files
    del sys.modules["gguf_files"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_file_holds_the_model(gguf_files, make_model, tmp_path, dtype, tied):
    """By larosa's reader, which the files of llama.cpp's own converter test."""
    from larosa.checkpoints.gguf import _weight

    model = make_model("llama", tie_word_embeddings=tied).to(dtype)
    path = gguf_files.write(model, tmp_path / "model.gguf")
    file, config = GgufFile(path), load_gguf_config(path)
    for name in ("hidden_size", "num_hidden_layers", "head_dim", "rope_parameters", "tie_word_embeddings"):
        assert getattr(config, name) == getattr(model.config, name)
    weights = dict(model.named_parameters())
    assert len(file.tensors) == len(weights)
    for name, weight in weights.items():
        assert torch.equal(_weight(file, gguf_files.tensor_name(name), config), weight.float())
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]

    found = gguf_files.sizes(path)
    linears = sum(w.numel() for n, w in weights.items() if "layers" in n and w.dim() == 2)
    head = model.lm_head.weight.numel()
    assert found["weight_bits"] == 8 * dtype.itemsize
    assert found["bytes_per_token"] == (linears + head) * dtype.itemsize
    assert found["file_bytes"] == path.stat().st_size


@torch.no_grad()
@pytest.mark.usefixtures("exact_norms")
def test_another_order_of_channels_computes_the_same(gguf_files, make_model, token_ids):
    model = make_model("llama", attention_bias=False, mlp_bias=False).double()
    ids = token_ids(1, 24)
    before = model(ids).logits
    weight = model.model.layers[0].mlp.down_proj.weight.clone()
    gguf_files.shuffle(model)
    assert not torch.equal(weight, model.model.layers[0].mlp.down_proj.weight)
    assert torch.allclose(model(ids).logits, before, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_importance_is_the_mean_square_of_inputs(gguf_files, make_model, token_ids):
    model = make_model("llama")
    found = gguf_files.importance(model, list(token_ids(3, 10)))
    assert len(found) == 7 * model.config.num_hidden_layers
    embedded = model.model.embed_tokens(token_ids(3, 10))
    expected = model.model.layers[0].input_layernorm(embedded).double().square().mean((0, 1))
    assert torch.allclose(found["blk.0.attn_k.weight"], expected)
    assert torch.equal(found["blk.0.attn_q.weight"], found["blk.0.attn_k.weight"])
