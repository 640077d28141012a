"""The engine against the model's own forward, whole and with transformers' cache."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch

import larosa
from larosa import LarosaError
from larosa.architectures import find_architecture
from larosa.config import PerSite
from larosa.decoding import CacheDtype, Engine, ForwardEngine
from larosa.decoding import weights as decoder_weights
from larosa.decoding.cache import cache_bytes
from larosa.models import set_keep_counts
from larosa.ops import backend
from larosa.ops.cpu.library import load
from larosa.ops.cuda import compiler
from larosa.sparsity import SiteSizes, keep_counts

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
#: None is the dense model.
CONVERSIONS = {
    "dense": None,
    **{f"larosa-{rotation}": {"rotation": rotation} for rotation in ("none", "random", "model", "layer", "block")},
    "larosa-shared": {"layers_per_rotation": 2},
    "larosa-int8": {"adapters": "int8", "rotation": "block"},
    "larosa-threshold": {"rotation": "layer", "selection": "threshold"},
    "magnitude": {"score": "magnitude"},
    "topk": {"method": "topk"},
    "teal": {"method": "teal"},
    "teal-greedy": {"method": "teal", "search": "greedy", "sparsity": 0.25},
}
LENGTH, PROMPT = 40, 11  # the windows of the tiny models are 8


@pytest.fixture
def make(make_model, quick_convert):
    """make(family, conversion, dtype, **overrides): a dense or converted tiny model."""

    def build(family, conversion, dtype=torch.float32, **overrides):
        model = make_model(family, dtype, **overrides)
        if CONVERSIONS[conversion] is None:
            return model
        return quick_convert(model, **CONVERSIONS[conversion])

    return build


def assert_same_logits(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.one_of(4)
def test_logits_are_the_forwards(make, clear_ids, step_logits, family, conversion):
    model = make(family, conversion)
    ids = clear_ids(model, LENGTH)
    expected = model(ids, use_cache=False).logits[0, PROMPT - 1 :]
    assert_same_logits(step_logits(Engine(model, LENGTH), ids, PROMPT), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.9])
@pytest.mark.one_of(2)
def test_any_sparsity(make_model, quick_convert, clear_ids, step_logits, family, sparsity):
    model = quick_convert(make_model(family), sparsity=sparsity)
    ids = clear_ids(model, LENGTH)
    expected = model(ids, use_cache=False).logits[0, PROMPT - 1 :]
    assert_same_logits(step_logits(Engine(model, LENGTH), ids, PROMPT), expected)


@pytest.mark.parametrize("prompt", [1, 2, 11])
def test_dense_prompts_as_the_configuration_says(make_model, quick_convert, clear_ids, step_logits, prompt):
    model = quick_convert(make_model("llama"), prefill="dense")
    ids = clear_ids(model, LENGTH, lambda ids: step_logits(ForwardEngine(model), ids, prompt))
    expected = step_logits(ForwardEngine(model), ids, prompt)
    assert_same_logits(step_logits(Engine(model, LENGTH), ids, prompt), expected)
    sparse = model(ids, use_cache=False).logits[0, prompt - 1 :]  # one long prompt, so not masked at all
    assert not torch.allclose(sparse[1:], expected[1:], atol=0.01)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "conversion"),
    [
        (torch.float16, "dense"),
        (torch.bfloat16, "dense"),
        (torch.bfloat16, "larosa-layer"),
        (torch.bfloat16, "larosa-threshold"),
        (torch.bfloat16, "teal"),
    ],
)
@pytest.mark.one_of(2)
def test_narrow_weights(make, token_ids, step_logits, family, dtype, conversion):
    # The same weights in float32 are the reference: the engine rounds less than the forward in the narrow type does.
    model, ids = make(family, conversion, dtype), token_ids(1, LENGTH)
    found = step_logits(Engine(model, LENGTH), ids, PROMPT)
    own = model(ids, use_cache=False).logits[0, PROMPT - 1 :].float()
    expected = model.float()(ids, use_cache=False).logits[0, PROMPT - 1 :]
    scale = expected.norm(dim=-1)
    error, own_error = ((x - expected).norm(dim=-1) / scale for x in (found, own))
    assert float(error.median()) <= 1.5 * float(own_error.median())
    # In a sparse model a near tie at the k-th place can go either way, and much of 32 entries hangs on one.
    assert conversion != "dense" or float(error.max()) < 0.02


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "dynamic", "factor": 2.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotary_embeddings(make, clear_ids, step_logits, rope):
    model = make("llama", "larosa-layer", rope_parameters={"rope_theta": 10000.0, **rope})
    ids = clear_ids(model, LENGTH)
    expected = model(ids, use_cache=False).logits[0, PROMPT - 1 :]
    assert_same_logits(step_logits(Engine(model, LENGTH), ids, PROMPT), expected)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        (
            {
                "rope_type": "longrope",
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
            },
            64,
        ),
    ],
    ids=["dynamic", "longrope"],
)
def test_rotary_embeddings_that_change_with_the_length(make, token_ids, step_logits, rope, limit):
    model = make("llama", "dense", rope_parameters={"rope_theta": 10000.0, **rope})
    ids = token_ids(1, limit)
    expected = model(ids, use_cache=False).logits[0, limit - 10 :]
    assert_same_logits(step_logits(Engine(model, limit), ids, limit - 9), expected)
    with pytest.raises(LarosaError, match=f"over {limit} tokens.*--engine transformers"):
        Engine(model, limit + 1)


def test_up_to_the_end_of_the_cache(make, clear_ids, step_logits):
    model = make("mistral", "larosa-layer")
    ids = clear_ids(model, 128)
    expected = model(ids, use_cache=False).logits[0, 3:]
    assert_same_logits(step_logits(Engine(model, 128), ids, 4), expected)


def test_a_new_prompt_forgets_the_last_text(make, token_ids, step_logits):
    model, ids, others = make("qwen3", "larosa-layer"), token_ids(1, LENGTH), token_ids(1, LENGTH, seed=1)
    engine = Engine(model, LENGTH)
    first = step_logits(engine, ids, PROMPT)
    step_logits(engine, others, 3)
    assert torch.equal(step_logits(engine, ids, PROMPT), first)
    assert torch.equal(step_logits(Engine(model, LENGTH), ids, PROMPT), first)


def test_two_engines_share_a_model(make, token_ids, step_logits):
    model = make("llama", "larosa-block")
    texts = token_ids(1, LENGTH), token_ids(1, LENGTH, seed=1)
    expected = [step_logits(Engine(model, LENGTH), ids, PROMPT) for ids in texts]
    engines = [Engine(model, LENGTH) for _ in texts]
    rows = [[engine.prefill(ids[:, :PROMPT])] for engine, ids in zip(engines, texts, strict=True)]
    for at in range(PROMPT, LENGTH):
        for row, engine, ids in zip(rows, engines, texts, strict=True):
            row.append(engine.step(ids[0, at : at + 1], torch.tensor([at])))
    for row, want in zip(rows, expected, strict=True):
        assert torch.equal(torch.cat(row), want)


@pytest.mark.parametrize("conversion", ["dense", "larosa-block", "topk"])
def test_the_model_goes_on_working(make, token_ids, tmp_path, conversion):
    model, ids = make("llama", conversion, tie_word_embeddings=conversion == "dense"), token_ids(2, 15)
    expected, before = model(ids).logits, {name: weight.clone() for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    Engine(model, 20)
    assert_same_logits(model(ids).logits, expected, 1e-5)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 19)


def test_no_weight_is_copied_or_kept_twice(make):
    model = make("qwen2", "larosa-layer")
    engine = Engine(model, 16)
    own = {weight.data_ptr() for weight in model.parameters()}
    read = [
        weight
        for layer in engine.weights.layers
        for site in (layer.h1, layer.h2, layer.h3, layer.h4)
        for weight in site.linears.weights
    ]
    assert len(read) == 3 * 7
    assert {weight.data_ptr() for weight in read} <= own
    assert all(weight.t().is_contiguous() and not weight.is_contiguous() for weight in read)


def test_weights_are_laid_out_anew_when_the_counts_change(make, clear_ids, step_logits):
    model = make("llama", "larosa-layer")
    architecture, sizes = find_architecture("llama"), SiteSizes.of(model.config)
    for sparsity in (0.5, 0.0, 0.25):
        set_keep_counts(model, architecture, keep_counts(sparsity, PerSite(), sizes))
        ids = clear_ids(model, LENGTH)
        expected = model(ids, use_cache=False).logits[0, PROMPT - 1 :]
        engine = Engine(model, LENGTH)
        assert engine.weights.layers[0].h3.linears.weights[0].is_contiguous() == (sparsity == 0)
        assert_same_logits(step_logits(engine, ids, PROMPT), expected)


def test_an_engine_outlives_what_others_do_with_the_weights(make, token_ids):
    model, ids = make("llama", "larosa-layer"), token_ids(1, LENGTH)
    engine = Engine(model, LENGTH)
    engine.prefill(ids[:, :PROMPT])

    def steps():
        return torch.cat([engine.step(ids[0, at : at + 1], torch.tensor([at])) for at in range(PROMPT, LENGTH)])

    expected = steps()
    architecture, sizes = find_architecture("llama"), SiteSizes.of(model.config)
    set_keep_counts(model, architecture, keep_counts(0.0, PerSite(), sizes))
    Engine(model, LENGTH)  # lays all weights out by rows, in other memory
    rubbish = [torch.full(weight.shape, float("nan")) for weight in model.parameters()]
    assert torch.equal(steps(), expected)
    assert rubbish[0].isnan().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("conversion", ["dense", "larosa-layer"])
@pytest.mark.one_of(2)
def test_a_cache_of_8_bits(make, clear_ids, step_logits, rounded_logits, family, conversion):
    model = make(family, conversion)
    ids = clear_ids(model, LENGTH, lambda ids: rounded_logits(model, ids, PROMPT))
    expected = rounded_logits(model, ids, PROMPT)
    found = step_logits(Engine(model, LENGTH, "int8"), ids, PROMPT)
    assert_same_logits(found, expected, 2e-3)  # close to a tie a digit may be another one
    exact = step_logits(Engine(model, LENGTH), ids, PROMPT)
    assert (found - expected).norm() < 0.1 * (exact - expected).norm()


def test_an_unknown_cache_is_refused(make_model):
    with pytest.raises(LarosaError, match="unknown kv_cache_dtype 'int4': one of auto, int8"):
        Engine(make_model("llama"), LENGTH, "int4")


def test_a_cache_of_8_bits_takes_half_of_16(make_model):
    config = make_model("llama", head_dim=64).config
    heads = config.num_hidden_layers * config.num_key_value_heads
    assert cache_bytes(config, CacheDtype.AUTO.beside(torch.bfloat16), 100) == 2 * heads * 100 * 128
    assert cache_bytes(config, CacheDtype.INT8.beside(torch.bfloat16), 100) == 2 * heads * 100 * (64 + 2)


def test_the_number_of_threads_may_change(make, clear_ids, step_logits):
    model = make("qwen2", "larosa-layer")
    ids = clear_ids(model, LENGTH)
    engine = Engine(model, LENGTH)
    expected = step_logits(engine, ids, PROMPT)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert_same_logits(step_logits(engine, ids, PROMPT), expected)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(step_logits(engine, ids, PROMPT), expected)


def test_a_step_reads_only_the_columns_it_keeps(make, token_ids):
    """A NaN in a column that no token keeps changes nothing."""
    model = make("llama", "larosa-none")
    score = model.model.layers[0].h1.score
    score[5] = 0.0  # never among the half with the largest scores
    engine, ids = Engine(model, 16), token_ids(1, 16)
    engine.prefill(ids[:, :4])
    expected = engine.step(ids[0, 4:5], torch.tensor([4]))
    model.model.layers[0].self_attn.q_proj.weight[:, 5] = float("nan")
    assert torch.equal(engine.step(ids[0, 4:5], torch.tensor([4])), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer(make, clear_ids, step_logits, family):
    model = make(family, "larosa-block", num_hidden_layers=1)
    ids = clear_ids(model, LENGTH)
    expected = model(ids, use_cache=False).logits[0, PROMPT - 1 :]
    assert_same_logits(step_logits(Engine(model, LENGTH), ids, PROMPT), expected)


class TestRefusals:
    """What the engine does not run, it says so about, and names the engine that does."""

    def test_cats(self, make_model, quick_convert):
        model = quick_convert(make_model("llama"), method="cats", sparsity=0.3)
        with pytest.raises(LarosaError, match="method cats: use --engine transformers"):
            Engine(model, 16)

    def test_another_activation(self, make_model):
        with pytest.raises(LarosaError, match="'gelu': use --engine transformers"):
            Engine(make_model("llama", hidden_act="gelu"), 16)

    def test_float64(self, make_model):
        with pytest.raises(LarosaError, match="float64: use --engine transformers"):
            Engine(make_model("llama", torch.float64), 16)

    def test_sparse_float16(self, make_model, quick_convert):
        model = quick_convert(make_model("llama", torch.float16))
        with pytest.raises(LarosaError, match=r"float16 on the CPU.*--dtype bfloat16, or use --engine transformers"):
            Engine(model, 16)

    def test_a_spread_model(self, make_model):
        model = make_model("llama")
        model.model.layers[1].to("meta")
        with pytest.raises(LarosaError, match="is not in memory"):
            Engine(model, 16)

    def test_an_installation_without_kernels(self, make_model, quick_convert, monkeypatch):
        def find():
            raise LarosaError("larosa was installed without its CPU kernels: install a compiler")

        model = quick_convert(make_model("llama"), sparsity=0.5)
        strides = [weight.stride() for weight in model.parameters()]
        monkeypatch.setattr("larosa.ops.cpu.library._find", find)
        load.cache_clear()
        try:
            with pytest.raises(LarosaError, match=r"without its CPU kernels.*, or use --engine transformers"):
                Engine(model, 16)
            assert [weight.stride() for weight in model.parameters()] == strides  # nothing was laid out in vain
        finally:
            monkeypatch.undo()
            load.cache_clear()
        assert Engine(model, 16).prefill(torch.tensor([[5]])).isfinite().all()
        assert [weight.stride() for weight in model.parameters()] != strides

    @pytest.mark.parametrize(
        ("kernels", "package", "mend"), [("cuda", "cuda.bindings", r"'larosa\[cuda\]'"), ("triton", "triton", "triton")]
    )
    def test_kernels_of_a_gpu_without_their_package(self, monkeypatch, kernels, package, mend):
        """What is asked of every device before weights are laid out; it takes no GPU to find the package missing."""
        monkeypatch.setenv("LAROSA_CUDA_KERNELS", kernels)
        for name in [name for name in sys.modules if f"{name}.".startswith((f"{package}.", "larosa.ops.triton."))]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
        caches = backend._kernels, compiler._nvrtc
        for cached in caches:
            cached.cache_clear()
        with pytest.raises(LarosaError, match=f"pip install {mend}"):
            backend.check_kernels(torch.device("cuda", 0))
        for cached in caches:
            cached.cache_clear()

    def test_codes_that_the_kernels_of_a_gpu_do_not_read(self, make_model, quick_convert, monkeypatch):
        """Before weights are laid out; the model is on a CPU, and the kernels are asked as for a GPU."""
        model = quick_convert(make_model("llama"), weights="int6", quantizer="rtn", sparsity=0.5)
        gpu = partial(backend.check_kernels, torch.device("cuda", 0))
        monkeypatch.setattr(decoder_weights, "check_kernels", lambda device, forms: gpu(forms))
        monkeypatch.setenv("LAROSA_CUDA_KERNELS", "cuda")
        with pytest.raises(LarosaError, match=r"int8 and int4, not of int6: set LAROSA_.*=triton, or use --engine tr"):
            Engine(model, 16)

    def test_a_cache_beyond_memory(self, make_model):
        model = make_model("llama")
        with pytest.raises(LarosaError, match=r"a cache of \d+ tokens needs \d+\.\d+ GB and cpu has .* free"):
            Engine(model, 10**12)
        assert Engine(model, 16).prefill(torch.tensor([[5]])).isfinite().all()

    @pytest.mark.parametrize("length", [0, 17])
    def test_a_prompt_that_does_not_fit(self, make_model, token_ids, length):
        with pytest.raises(LarosaError, match=f"a prompt of {length} tokens does not fit a cache of 16"):
            Engine(make_model("llama"), 16).prefill(token_ids(1, length))


def test_larosa_exports_the_engine():
    assert larosa.Engine is Engine
