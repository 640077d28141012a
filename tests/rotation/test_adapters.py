"""That what is behind an adapter is what was stored of it."""

import pytest
import torch

import larosa
from larosa import LarosaError
from larosa.config import LarosaConfig, Rotation, check_adapters
from larosa.formats import AdapterFormat
from larosa.formats.adapters import INT8_ADAPTERS
from larosa.rotation import LayerBases, connect, random_basis

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("moves", [1e-3, 0.03, 0.3])
@pytest.mark.parametrize("strength", [30, 300, 3000])
def test_a_massive_entry_makes_top_k_lose_no_more_by_digits(strength, moves):
    """Streams of some models have an entry thousands of times the others, whose direction the leading one follows."""
    width, generator = 512, torch.Generator().manual_seed(0)
    i = torch.arange(width, dtype=torch.float64)
    turn = torch.randn(width, width, generator=generator, dtype=torch.float64)
    turn *= 0.2 / (1 + (i[:, None] - i).abs()).sqrt()
    turn[0] *= moves
    turn[:, 0] *= moves
    R = torch.linalg.matrix_exp((turn - turn.T) / 2)
    x = torch.randn(64, width, generator=generator, dtype=torch.float64) / (i + 1).sqrt()
    x[:, 0] = strength * x[:, 1:].square().mean(1).sqrt()

    def lost(matrix):
        """Of all but the massive entry, the fraction of energy that is not in half of the entries behind an adapter."""
        entries = x @ matrix
        cut = entries.abs().kthvalue(width // 2, dim=1, keepdim=True).values
        back = (entries * (entries.abs() > cut)) @ torch.linalg.inv(matrix)
        return float((back - x)[:, 1:].square().sum() / x[:, 1:].square().sum())

    by_digits = INT8_ADAPTERS.unpack(INT8_ADAPTERS.pack(R, torch.bfloat16))
    assert lost(R) > 0.01, "something is lost, or there is nothing to compare"
    assert lost(by_digits) < 1.05 * lost(R)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("adapters", AdapterFormat)
@pytest.mark.parametrize("block", [False, True])
def test_coordinates_are_those_that_stored_adapters_lead_to(dtype, adapters, block):
    names = iter(range(100))
    bases = [
        LayerBases(Q := random_basis(48, next(names)), random_basis(48, next(names)) if block else Q) for _ in "abc"
    ]
    x = torch.randn(5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = None
    for basis, frame in zip(bases, connect(bases, adapters, dtype), strict=True):
        h = x @ basis.attention if h is None else h @ adapters.storage.unpack(frame.before)
        torch.testing.assert_close(h, x @ frame.attention.vectors, rtol=0, atol=1e-12)
        if block:
            h = h @ adapters.storage.unpack(frame.between)
        torch.testing.assert_close(h, x @ frame.mlp.vectors, rtol=0, atol=1e-12)
        # What reads x reads the coordinates by the dual: nothing is lost, however coarse the numbers are.
        torch.testing.assert_close(h @ frame.mlp.dual.T, x, rtol=0, atol=1e-11)
        # And they are nearly those that were wanted: errors do not add up.
        error = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
        assert relative(frame.mlp.vectors, basis.mlp) < (2e-2 if adapters is AdapterFormat.INT8 else error)


def test_shared_bases_stay_shared():
    Q, other = random_basis(32, 0), random_basis(32, 1)
    frames = list(
        connect([LayerBases(Q, Q), LayerBases(Q, Q), LayerBases(other, other)], AdapterFormat.INT8, torch.float16)
    )
    assert frames[0].attention is frames[0].mlp is frames[1].attention is frames[1].mlp
    assert frames[1].before is frames[1].between is frames[2].between is None
    assert frames[2].before is not None
    assert frames[2].attention is frames[2].mlp


def test_without_rotation_there_is_nothing_to_connect():
    for frame in connect([LayerBases(None, None)] * 2, AdapterFormat.FULL):
        assert frame == (None, None, None, None, None)


@pytest.mark.parametrize("rotation", ["layer", "block"])
def test_8_bits_lose_nothing_but_a_little_of_the_norms(make_model, quick_convert, token_ids, rotation):
    """In float64, where nothing else is rounded."""
    model, ids = make_model("llama", torch.float64, hidden_size=64, head_dim=16), token_ids(2, 24)
    expected = model(ids).logits
    converted = quick_convert(model, sparsity=0.0, rotation=rotation, adapters="int8")
    merged = relative(converted(ids).logits, expected)
    for layer, behind in zip(converted.model.layers, [*converted.model.layers[1:], None], strict=True):
        for adapter in (layer.attention_adapter, layer.residual_adapter if behind is not None else None):
            if adapter is not None:  # one step of every digit is far less than what rounding did
                adapter.weight += (adapter.weight < 0).to(torch.int8) - (adapter.weight > 0).to(torch.int8)
    assert 1e-9 < merged < 5e-3
    assert merged < relative(converted(ids).logits, expected) / 5


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, "full"), (torch.float32, "full"), (torch.float16, "int8"), (torch.bfloat16, "int8")],
)
def test_16_bit_models_have_8_bit_adapters_by_default(make_model, quick_convert, dtype, expected):
    assert AdapterFormat.usual(dtype) == expected
    converted = quick_convert(make_model("llama", dtype))
    assert converted.config.larosa["adapters"] == expected
    assert (converted.model.layers[0].residual_adapter.weight.dtype is torch.int8) == (expected == "int8")
    assert quick_convert(make_model("llama", dtype), recipe="paper", search="none").config.larosa["adapters"] == "full"


@pytest.mark.parametrize("options", [{"rotation": "model"}, {"rotation": "none"}, {"method": "topk"}])
def test_where_there_are_no_adapters_there_is_no_choice(make_model, quick_convert, options):
    assert quick_convert(make_model("llama", torch.bfloat16), **options).config.larosa["adapters"] == "full"
    with pytest.raises(LarosaError, match=r"adapters 'int8': rotation '(model|none)' has none: leave it out"):
        quick_convert(make_model("llama"), adapters="int8", **options)
    with pytest.raises(LarosaError, match="unknown adapters 'int4': one of full, int8"):
        quick_convert(make_model("llama"), adapters="int4")


def test_checkpoints_from_before_have_full_adapters(make_model, quick_convert):
    block = quick_convert(make_model("llama", torch.float32)).config.larosa
    del block["adapters"]
    assert LarosaConfig.parse(block).adapters is AdapterFormat.FULL
    with pytest.raises(LarosaError, match=r"key 'larosa\.adapters'"):
        LarosaConfig.parse({**block, "adapters": "int4"})
    with pytest.raises(LarosaError, match="adapters 'int8': rotation 'model' has none"):
        check_adapters(AdapterFormat.INT8, Rotation.MODEL)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("other", [torch.float32, torch.float16])
def test_saves_and_loads_8_bit_adapters(make_model, quick_convert, token_ids, tokenizer, tmp_path, family, other):
    model = quick_convert(make_model(family, torch.bfloat16))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = token_ids(1, 9)
    loaded = larosa.load(str(tmp_path)).model
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    cast = larosa.load(str(tmp_path), dtype=str(other).removeprefix("torch.")).model
    before, after = (m.model.layers[0].residual_adapter for m in (model, cast))
    assert after.weight.dtype is torch.int8
    assert torch.equal(after.weight, before.weight)
    assert torch.equal(after.scale.double(), before.scale.double())
