"""Converted models travel as any PyTorch model does."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import larosa


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("method", ["larosa", "teal", "cats"])
def test_pickled_and_copied(make_model, quick_convert, token_ids, family, method):
    model = quick_convert(make_model(family), method=method, sparsity=0.3)
    expected = model(token_ids(1, 9)).logits
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(again) is type(model)
        assert type(again.model.layers[0]) is type(model.model.layers[0])
        assert torch.equal(again(token_ids(1, 9)).logits, expected)
        again.set_input_embeddings(None)  # nothing is shared
    assert torch.equal(model(token_ids(1, 9)).logits, expected)


@pytest.mark.slow
def test_saved_whole_and_loaded_elsewhere(make_model, quick_convert, token_ids, tmp_path):
    model = quick_convert(make_model("llama"))
    torch.save(model, tmp_path / "model.pt")
    torch.save(model(token_ids(1, 9)).logits, tmp_path / "logits.pt")
    torch.save(token_ids(1, 9), tmp_path / "ids.pt")
    code = (
        "import torch; torch.set_num_threads(1); load = lambda name: torch.load(name, weights_only=False)\n"
        "assert torch.equal(load('model.pt')(load('ids.pt')).logits, load('logits.pt'))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype(make_model, tokenizer, quick_convert, dtype):
    model = quick_convert(make_model("llama"))
    expected = larosa.generate(model, tokenizer, "w5 w6 w7", max_new_tokens=8, engine="larosa").text
    torch.set_default_dtype(dtype)
    try:
        assert larosa.generate(model, tokenizer, "w5 w6 w7", max_new_tokens=8, engine="larosa").text == expected
        quick_convert(make_model("llama"))
    finally:
        torch.set_default_dtype(torch.float32)
