import pytest
import torch
from transformers import AutoModelForCausalLM

from larosa.architectures import find_architecture
from larosa.config import SITES
from larosa.models import selectors

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
READERS = {
    "h1": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "h2": ("self_attn.o_proj",),
    "h3": ("mlp.gate_proj", "mlp.up_proj"),
    "h4": ("mlp.down_proj",),
}
KEYS = {
    "h1": "h1.score",
    "h2": "self_attn.o_proj.selector.score",
    "h3": "h3.score",
    "h4": "mlp.down_proj.selector.score",
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rotation", ["layer", "none"])
def test_scores_are_the_column_norms_of_the_weights_as_saved(make_model, quick_convert, family, rotation):
    model = quick_convert(make_model(family, torch.float64), rotation=rotation, score="weights")
    weights = model.state_dict()
    for i in range(3):
        for site in SITES:
            matrix = torch.cat([weights[f"model.layers.{i}.{name}.weight"] for name in READERS[site]])
            expected = [sum(float(entry) ** 2 for entry in column) ** 0.5 for column in matrix.T]
            torch.testing.assert_close(weights[f"model.layers.{i}.{KEYS[site]}"], torch.tensor(expected).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_have_the_models_dtype_and_come_back_bit_by_bit(make_model, quick_convert, tmp_path, token_ids, dtype):
    model = quick_convert(make_model("llama", dtype))
    model.save_pretrained(tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for site, found in selectors(loaded, find_architecture("llama")).items():
        for selector, before in zip(found, selectors(model, find_architecture("llama"))[site], strict=True):
            assert selector.score.dtype == dtype
            assert torch.equal(selector.score, before.score)


def test_no_scores_where_magnitude_decides(make_model, quick_convert):
    model = quick_convert(make_model("llama"), score="magnitude")
    assert not any("score" in name for name in model.state_dict())
    for name in ("topk", "teal", "cats"):
        options = {} if name == "topk" else {"sparsity": 0.3}
        assert not any(
            "score" in key for key in quick_convert(make_model("llama"), method=name, **options).state_dict()
        )


def test_a_score_of_the_topk_baseline_can_be_asked_for(make_model, quick_convert):
    model = quick_convert(make_model("llama"), method="topk", score="weights")
    assert "model.layers.0.h1.score" in model.state_dict()


def test_print_says_what_is_kept_and_by_what(make_model, quick_convert):
    assert "TopK(k=16, scored)" in str(quick_convert(make_model("llama"), search="none"))
    assert "TopK(k=16)" in str(quick_convert(make_model("llama"), score="magnitude"))
