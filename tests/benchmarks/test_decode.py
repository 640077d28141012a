"""What the decode benchmark runs and what it makes of the times; never how fast it was."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import larosa
from larosa import LarosaError
from larosa.benchmarks import decode, shapes
from larosa.benchmarks.decode import DENSE, DENSE_LOW_BIT, TRANSFORMERS, measure_checkpoints, measure_shape
from larosa.benchmarks.shapes import (
    SHAPES,
    Layout,
    random_dense_model,
    random_model,
    random_quantization,
    random_sparse_model,
    set_sparsity,
    shape_config,
    sparse_copies,
    sparse_models,
)
from larosa.benchmarks.sizes import weight_bytes
from larosa.config import Selection
from larosa.decoding import Engine
from larosa.formats import AdapterFormat, WeightFormat
from larosa.models import Threshold
from larosa.sparsity import SiteSizes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_read_test(monkeypatch):
    monkeypatch.setattr("larosa.benchmarks.bandwidth._BYTES", 1 << 20)


@pytest.fixture
def tiny(monkeypatch, family_config):
    """The shape "tiny" of a family."""

    def make(family, **overrides):
        monkeypatch.setitem(SHAPES, "tiny", lambda: family_config(family, **overrides))

    return make


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.one_of(3)
def test_rows_of_a_shape(tiny, family, tied):
    tiny(family, tie_word_embeddings=tied)
    result = measure_shape("tiny", sparsities=(0.25, 0.5), dtype=torch.float32, prompt_tokens=5, tokens=10)
    assert [(row.row, row.sparsity) for row in result.rows] == [
        (TRANSFORMERS, 0.0),
        (DENSE, 0.0),
        ("LaRoSA", 0.25),
        ("LaRoSA", 0.5),
    ]
    reference, dense = result.rows[:2]
    for row in result.rows:
        assert (row.shape, row.dtype, row.tokens, row.prompt_tokens) == ("tiny", "float32", 10, 5)
        assert row.tokens_per_second == pytest.approx(1e3 / row.ms_per_token)
        assert row.ms_per_token <= row.ms_per_token_p95
        assert row.speedup == pytest.approx(dense.ms_per_token / row.ms_per_token)
        assert row.speedup_over_transformers == pytest.approx(reference.ms_per_token / row.ms_per_token)
        assert row.floor_ms == pytest.approx(1e3 * row.bytes_per_token / result.bandwidth)
        assert row.floor_fraction == pytest.approx(row.floor_ms / row.ms_per_token)
    assert json.loads(json.dumps(result.to_dict()))["rows"][3]["sparsity"] == 0.5


def test_rows_of_batches(tiny):
    tiny("llama")
    options = {"sparsities": (0.5,), "dtype": torch.float32, "prompt_tokens": 5, "tokens": 10}
    result = measure_shape("tiny", **options, batches=(1, 3))
    assert [(row.row, row.batch) for row in result.rows] == [
        (TRANSFORMERS, 1),
        (DENSE, 1),
        (DENSE, 3),
        ("LaRoSA", 1),
        ("LaRoSA", 3),
    ]
    for row in result.rows:
        assert row.total_tokens_per_second == pytest.approx(row.batch * row.tokens_per_second)
        assert row.speedup == pytest.approx(row.total_tokens_per_second / result.rows[1].total_tokens_per_second)
    one, three = result.rows[1:3]
    assert three.bytes_per_token - one.bytes_per_token == 2 * 2 * 3 * 2 * 8 * (5 + 5) * 4  # keys and values
    for batches in ((), (0,), (1, 9)):
        with pytest.raises(LarosaError, match="--batch takes numbers of texts from 1 to 8"):
            measure_shape("tiny", **options, batches=batches)


#: Bytes of an adapter of 8-bit numbers in a 16-bit model of 32 entries, of which 16 have two digits.
ADAPTER = 32 * (32 + 16) + 2 * 32


def test_bytes_of_a_token(tiny):
    tiny("llama")
    rows = measure_shape("tiny", sparsities=(0.5,), dtype=torch.bfloat16, prompt_tokens=4, tokens=8).rows
    attention, mlp = 32 * 32 + 2 * 32 * 16 + 32 * 32, 3 * 32 * 56
    head, cache = 128 * 32, 2 * 3 * 2 * 8 * (4 + 4)  # layers, key heads, size, the mean position
    assert rows[1].bytes_per_token == 2 * (3 * (attention + mlp) + head + cache)
    adapters, scores = 2 * ADAPTER, 3 * (32 + 32 + 32 + 56)
    assert rows[2].bytes_per_token == 2 * (3 * (attention + mlp) // 2 + head + cache + scores) + adapters


def test_fewer_rotations_mean_fewer_bytes(tiny):
    tiny("llama", num_hidden_layers=5)
    options = {"sparsities": (0.5,), "dtype": torch.bfloat16, "prompt_tokens": 4, "tokens": 8}
    every = measure_shape("tiny", **options).rows
    shared = measure_shape("tiny", layout=Layout(2), **options).rows
    full = measure_shape("tiny", layout=Layout(2, AdapterFormat.FULL), **options).rows
    assert {row.shape for row in shared} == {"tiny, 2 layers per rotation"}
    assert {row.shape for row in full} == {"tiny, 2 layers per rotation, full adapters"}
    assert shared[1].bytes_per_token == every[1].bytes_per_token
    assert every[2].bytes_per_token - shared[2].bytes_per_token == (4 - 2) * ADAPTER
    assert full[2].bytes_per_token - shared[2].bytes_per_token == 2 * (2 * 32 * 32 - ADAPTER)


def test_few_bits_have_a_dense_row_of_their_own(tiny):
    tiny("llama")
    layout = Layout(quantization=random_quantization(WeightFormat.INT4, 32))
    rows = measure_shape("tiny", sparsities=(0.5,), layout=layout, prompt_tokens=4, tokens=8).rows
    assert [row.row for row in rows] == [TRANSFORMERS, DENSE, DENSE_LOW_BIT, "LaRoSA"]
    assert [row.dtype for row in rows] == ["bfloat16", "bfloat16", "int4", "int4"]
    columns = {16: 8 + 2, 32: 16 + 2, 56: 28 + 4, 128: 128 + 8}  # outputs, bytes; the head has 8 bits
    h1, h2, h3, h4 = 32 * (columns[32] + 2 * columns[16]), 32 * columns[32], 32 * 2 * columns[56], 56 * columns[32]
    linears, head, cache = 3 * (h1 + h2 + h3 + h4), 32 * columns[128], 2 * 2 * 3 * 2 * 8 * (4 + 4)
    scores = 2 * 3 * (32 + 32 + 32 + 56)
    assert rows[2].bytes_per_token == linears + head + cache + scores
    assert rows[3].bytes_per_token == linears // 2 + head + cache + scores + 2 * ADAPTER


def test_rows_take_turns(tiny, monkeypatch):
    tiny("llama")
    turns = []
    run = decode._Subject.run
    monkeypatch.setattr(
        decode._Subject, "run", lambda self, tokens: (turns.append((self.name, tokens)), run(self, tokens))
    )
    measure_shape("tiny", sparsities=(0.5,), prompt_tokens=3, tokens=19)
    assert turns == [(name, tokens) for tokens in (8, 8, 3) for name in (TRANSFORMERS, DENSE, "LaRoSA")]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_random_models_are_of_their_size_and_compute_something(family_config, family):
    config = family_config(family, tie_word_embeddings=True)
    int4 = random_quantization(WeightFormat.INT4, 64)
    for layout in (None, Layout(), Layout(2), Layout(1, AdapterFormat.FULL), Layout(quantization=int4)):
        if layout is None:
            model = random_model(config, torch.bfloat16, CPU)
        else:
            model = random_sparse_model(config, torch.bfloat16, CPU, layout=layout)
        assert all(weight.isfinite().all() for weight in model.parameters())
        counted = [weight for name, weight in model.named_parameters() if weight.dim() > 1 or "adapter" in name]
        assert sum(weight.numel() * weight.itemsize for weight in counted) == weight_bytes(
            config, torch.bfloat16, layout
        )
        logits = Engine(model, 8).prefill(torch.tensor([[5, 6, 7]]))
        assert 0.1 < float(logits.std()) < 100


class Largest(TorchDispatchMode):
    """Notes the largest tensor that operators make, of those that take memory."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, torch.Tensor) and made.device.type != "meta":
                self.nbytes = max(self.nbytes, made.nbytes)
        return result


@pytest.mark.parametrize("weights", [WeightFormat.INT8, WeightFormat.INT4])
def test_linears_of_few_bits_are_never_there_in_full(family_config, monkeypatch, weights):
    """A model that fits a GPU in few bits need not fit it in 16."""
    monkeypatch.setattr(shapes, "_BLOCK", 101)
    config = family_config("llama", intermediate_size=512)
    with Largest() as largest:
        model = random_dense_model(config, torch.bfloat16, CPU, Layout(quantization=random_quantization(weights, 32)))
    held = {name: weight.nbytes for name, weight in model.named_parameters()}
    assert largest.nbytes == max(held.values())
    assert largest.nbytes < config.intermediate_size * config.hidden_size * torch.bfloat16.itemsize


@pytest.mark.parametrize("weights", [WeightFormat.INT8, WeightFormat.INT4])
def test_random_weights_of_few_bits_have_no_mean(family_config, weights):
    """It would be a direction that each layer adds to and the next multiplies: 80 of them overflow in float16."""
    config, layout = (
        family_config("llama", intermediate_size=512),
        Layout(quantization=random_quantization(weights, 32)),
    )
    linear = random_dense_model(config, torch.bfloat16, CPU, layout).model.layers[0].mlp.down_proj
    weight = linear.format.dequantize(linear.codes, linear.scales, linear.out_features, torch.float32)
    assert abs(weight.mean()) < 0.02 * weight.square().mean().sqrt()  # 11% of it for codes from -8 to 7


def test_models_that_share_weights_hold_them_once(family_config, token_ids):
    config, layout = family_config("llama"), Layout(quantization=random_quantization(WeightFormat.INT8, 32))
    dense = random_dense_model(config, torch.bfloat16, CPU, layout)
    shared = {id(weight) for weight in dense.parameters()}
    ids = token_ids(1, 5)
    for sparsity, model in sparse_models(config, torch.bfloat16, CPU, (0.5, 0.0), layout, like=dense):
        own = {name for name, weight in model.named_parameters() if id(weight) not in shared}
        assert own
        assert all("residual_adapter" in name for name in own)
        alone = random_sparse_model(config, torch.bfloat16, CPU, layout=layout)
        set_sparsity(alone, sparsity)
        assert torch.equal(model(ids).logits, alone(ids).logits)


def test_the_sparsity_of_a_random_model_can_be_set(family_config):
    model = random_sparse_model(family_config("llama"), torch.float32, CPU, layout=Layout(2))
    for sparsity in (0.5, 0.25, 0.0):
        set_sparsity(model, sparsity)
        report = larosa.inspect(model)
        assert report.sparsity.weights == pytest.approx(sparsity)
        assert report.adapter_bytes == 4 * 32 * 32


def test_thresholds_of_a_random_model_keep_what_is_asked_for(family_config, token_ids):
    model = random_sparse_model(family_config("llama"), torch.float32, CPU, selection=Selection.THRESHOLD)
    ids = token_ids(1, 100, seed=5)
    shares: list[float] = []
    for module in model.modules():
        if isinstance(module, Threshold):
            module.register_forward_hook(lambda _, inputs, x: shares.append(float((x == 0).float().mean())))
    for sparsity in (0.5, 0.25, 0.0):
        set_sparsity(model, sparsity)
        assert larosa.inspect(model).sparsity.weights == pytest.approx(sparsity, abs=0.01)
        shares.clear()
        model(ids)
        assert len(shares) == 12
        assert all(abs(share - sparsity) < 0.1 for share in shares)


def test_rows_by_thresholds(tiny):
    tiny("llama")
    options = {"sparsities": (0.5,), "dtype": torch.bfloat16, "prompt_tokens": 4, "tokens": 8}
    counts = measure_shape("tiny", **options).rows[2]
    compared = measure_shape("tiny", selection=Selection.THRESHOLD, **options).rows[2]
    assert (compared.row, compared.sparsity) == ("LaRoSA, thresholds", 0.5)
    assert compared.bytes_per_token == pytest.approx(counts.bytes_per_token, rel=0.02)


@pytest.mark.parametrize("sparsities", [(0.5, 0.25), (0.0, 0.5, 0.0, 0.25), (0.0,), ()])
@pytest.mark.parametrize("layout", [Layout(), Layout(2), Layout(1, AdapterFormat.INT8)])
def test_models_at_several_sparsities_are_those_at_each(family_config, token_ids, sparsities, layout):
    config = family_config("llama")
    prompt, token, position = token_ids(1, 5), torch.tensor([7]), torch.tensor([5])
    engines, made = [], set()
    for sparsity, model in sparse_models(config, torch.float32, CPU, sparsities, layout):
        engines.append((sparsity, Engine(model, 8)))
        engines[-1][1].prefill(prompt)
        made.add(id(model))
    assert [sparsity for sparsity, _ in engines] == list(sparsities)
    assert len(made) == sparse_copies(sparsities)
    for sparsity, engine in engines:  # all together, as a benchmark runs them
        alone = random_sparse_model(config, torch.float32, CPU, layout=layout)
        set_sparsity(alone, sparsity)
        expected = Engine(alone, 8)
        expected.prefill(prompt)
        torch.testing.assert_close(engine.step(token, position), expected.step(token, position))


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_can_be_cut(name):
    config = shape_config(name, layers=2, vocab_size=100)
    assert (config.num_hidden_layers, config.vocab_size) == (2, 100)
    assert SiteSizes.of(shape_config(name)).layers > 2


def test_known_sizes():
    """Parameters of the decoder linears, embedding and head, by the models' cards."""
    billions = {"llama-2-7b": 6.74, "llama-3-8b": 8.03, "llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21, "qwen2.5-7b": 7.61}
    billions |= {"mistral-7b": 7.25, "qwen3-0.6b": 0.6, "qwen3-8b": 8.19, "llama-3-70b": 70.6, "smollm3-3b": 3.08}
    for name, size in billions.items():
        assert weight_bytes(shape_config(name), torch.int8) / 1e9 == pytest.approx(size, rel=0.01)


@pytest.fixture
def checkpoints(tmp_path, make_model, quick_convert, tokenizer):
    folders = {"dense": make_model("llama"), "sparse": quick_convert(make_model("llama"))}
    for name, model in folders.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return [str(tmp_path / name) for name in folders]


def test_checkpoints(checkpoints):
    dense, sparse = checkpoints
    for order in ([dense, sparse], [sparse, dense]):
        rows = measure_checkpoints(order, prompt_tokens=3, tokens=4).rows
        assert [(row.row, row.sparsity) for row in rows] == [(TRANSFORMERS, 0.0), (DENSE, 0.0), (sparse, 0.5)]
        assert rows[0].shape == dense


@pytest.mark.parametrize("number", [0, 2])
def test_speedups_need_one_dense_model(checkpoints, number):
    dense, sparse = checkpoints
    with pytest.raises(LarosaError, match=f"{number} of the checkpoints are dense"):
        measure_checkpoints([sparse, *[dense] * number], prompt_tokens=3, tokens=4)


def test_checkpoints_of_another_shape_or_format(checkpoints, tmp_path, make_model, quick_convert, tokenizer):
    others = {"wide": {"intermediate_size": 64}, "grouped": {"num_key_value_heads": 1}, "half": {}}
    for name, sizes in others.items():
        dtype = torch.bfloat16 if name == "half" else torch.float32
        quick_convert(make_model("llama", dtype=dtype, **sizes)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        path = str(tmp_path / name)
        message = (
            "is in bfloat16 and .*dense in float32: give a --dtype" if name == "half" else "has another shape than"
        )
        with pytest.raises(LarosaError, match=f"{name} {message}"):
            measure_checkpoints([path, checkpoints[0]], prompt_tokens=3, tokens=4)
    rows = measure_checkpoints(
        [str(tmp_path / "half"), checkpoints[0]], dtype="float32", prompt_tokens=3, tokens=4
    ).rows
    assert {row.dtype for row in rows} == {"float32"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "gpt-5"}, "unknown shape 'gpt-5': one of llama-2-7b"),
        ({"layers": 0}, "--layers 0: tiny has 3"),
        ({"layers": 4}, "--layers 4: tiny has 3"),
        ({"vocab_size": 0}, "--vocab-size must be at least 1"),
        ({"sparsities": (50.0,)}, "give a fraction"),
        ({"prompt_tokens": 0}, "--prompt-tokens must be at least 1"),
        ({"tokens": 1}, "--tokens at least 2"),
    ],
)
def test_bad_options(tiny, options, message):
    tiny("llama")
    with pytest.raises(LarosaError, match=message):
        measure_shape(**{"shape": "tiny", **options})


def test_a_layout_has_a_layer_for_each_rotation():
    with pytest.raises(LarosaError, match="0 layers per rotation: give at least 1"):
        Layout(0)


def test_models_beyond_memory(tiny, monkeypatch):
    tiny("llama")
    monkeypatch.setattr("larosa.benchmarks.sizes.available_memory", lambda device: 1000)
    with pytest.raises(LarosaError, match=r"the models need .* GB and cpu has 0\.0 GB free.*--layers"):
        measure_shape("tiny")
