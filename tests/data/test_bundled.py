"""The bundled model and text: what the method gains on trained weights, and that it is exact there too."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import larosa
from larosa.data.bundled import bundled_model
from larosa.data.text import BUNDLED, TextSplit, read_text
from larosa.demo.quality import SPARSITIES

#: How far LaRoSA's divergence has to stay below that of Top-K without rotation.
BAR = 0.6
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the command finds as a user runs it."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-c", "from larosa.cli.main import main; main()", "demo"]
    subprocess.run([*command, "--json", "demo.json", "--device", "cpu"], check=True, cwd=folder)
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "demo.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def demo(report):
    """KL divergence by method and sparsity."""
    return report["rows"]


def by_sparsity(rows, method, key="kl_divergence"):
    return {row["sparsity"]: row[key] for row in rows if row["method"] == method}


@SLOW
def test_demo_starts_from_the_dense_model(demo):
    assert demo[0]["method"] == "Dense"
    assert demo[0]["kl_divergence"] == 0
    assert demo[0]["top1_agreement"] == 1


@SLOW
def test_calibrated_rotation_pays_and_a_random_one_does_not(demo):
    plain, chance, larosa_ = (by_sparsity(demo, m) for m in ("Top-K, no rotation", "Top-K, random rotation", "LaRoSA"))
    for sparsity in SPARSITIES:
        assert larosa_[sparsity] <= BAR * plain[sparsity]
        assert chance[sparsity] >= plain[sparsity]


@SLOW
def test_the_demo_times_a_cached_model_and_one_that_is_not(report):
    rows = [(row["shape"], row["row"], row["sparsity"]) for row in report["speed"]]
    decoders = [("transformers dense", 0.0), ("engine dense", 0.0), ("LaRoSA", 0.25), ("LaRoSA", 0.5)]
    assert rows == [(shape, *row) for shape in ("larosa-tiny", "llama-3.2-1b, 3 layers") for row in decoders]
    assert all(row["tokens_per_second"] > 0 for row in report["speed"])


@SLOW
def test_more_sparsity_costs_more(demo):
    for method in ("Top-K, no rotation", "Top-K, random rotation", "LaRoSA"):
        divergence = list(by_sparsity(demo, method).values())
        agreement = list(by_sparsity(demo, method, "top1_agreement").values())
        assert divergence == sorted(divergence)
        assert agreement == sorted(agreement, reverse=True)


def trained(make_model, model_type, dtype):
    """A family's architecture with the bundled model's trained weights in it.

    What the Llama model lacks (biases, norms of q and k) stays random, so nothing is trivially absent.
    """
    source = AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=dtype)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = source.config
    model = make_model(
        model_type,
        dtype=dtype,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        tie_word_embeddings=True,
        **{size: getattr(config, size) for size in sizes},
    )
    missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
    assert unexpected == []
    assert all("bias" in name or "q_norm" in name or "k_norm" in name for name in missing)
    return model


@pytest.mark.parametrize(
    "rotation", [*(pytest.param(r, marks=SLOW) for r in ("none", "random", "model", "block")), "layer"]
)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), pytest.param(torch.float32, 1e-4, marks=SLOW)]
)
@pytest.mark.one_of(5)
def test_nothing_changes_at_zero_sparsity(request, make_model, model_type, rotation, dtype, tolerance):
    if dtype is torch.float64:
        request.getfixturevalue("exact_norms")
    model = trained(make_model, model_type, dtype)
    ids = torch.randint(model.config.vocab_size, (1, 48), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits
    larosa.convert(model, sparsity=0, rotation=rotation, num_sequences=2, sequence_length=64)
    found = model(ids).logits
    assert float((found - expected).abs().max() / expected.abs().max()) <= tolerance


def test_bundled_text_is_long_enough_and_one_article_after_another():
    text = read_text(BUNDLED, TextSplit.TEST)
    assert len(text.split()) >= 6000
    assert sum(line.startswith("= ") for line in text.splitlines()) >= 20


def test_bundled_model_is_small_and_writes_words():
    model, tokenizer = larosa.load(bundled_model(), device="cpu")
    text = larosa.generate(model, tokenizer, "The river flows", max_new_tokens=64, temperature=0.7, seed=3).text
    words = text.split()
    known = read_text(BUNDLED, TextSplit.TEST).lower()
    assert sum(word.strip(".,;:").lower() in known for word in words) >= len(words) / 2
