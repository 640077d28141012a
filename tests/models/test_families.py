import copy
import io
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BitNetQuantConfig, Mxfp4Config, pipeline

from larosa import LarosaError
from larosa.models import SparseLinear

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}
ROTATIONS = ("layer", "block", "none", "model", "random")


def run_python(code, *arguments):
    """Run code in a fresh process, where nothing has imported larosa yet."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def realigned(model):
    """Move weights out of the mapped file: another alignment can mean another kernel with other last bits."""
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model


@pytest.fixture(scope="module")
def saved(make_model, quick_convert, token_ids, tokenizer, tmp_path_factory):
    """A folder with a sharded checkpoint of each family, and its logits before saving in logits.pt."""
    root = tmp_path_factory.mktemp("checkpoints")
    for family, rotation in zip(FAMILIES, ROTATIONS, strict=True):
        tied = rotation in ("layer", "none")  # the one unties it, the other keeps it
        model = quick_convert(make_model(family, tie_word_embeddings=tied), rotation=rotation)
        model.save_pretrained(root / family, max_shard_size="20KB")
        tokenizer.save_pretrained(root / family)
        torch.save(model(token_ids(2, 15)).logits, root / family / "logits.pt")
    return root


@pytest.fixture
def edited(saved, tmp_path):
    """edited(change): a copy of a checkpoint whose config.json has gone through `change`."""

    def make(change):
        folder = tmp_path / "edited"
        folder.mkdir()
        for file in (saved / "llama").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text("utf-8"))
        change(config)
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
        return folder

    return make


@pytest.mark.slow
def test_checkpoints_load_bit_by_bit_in_a_fresh_process(saved, token_ids):
    code = """
import sys, torch, larosa
from pathlib import Path
from transformers import AutoModel, AutoModelForCausalLM
root, *families = sys.argv[1:]
torch.set_num_threads(1)
ids = torch.load(Path(root) / "ids.pt")
for family in families:
    model, info = AutoModelForCausalLM.from_pretrained(Path(root) / family, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for weight in model.parameters():
        weight.data = weight.data.clone()  # see `realigned`
    assert torch.equal(model(ids).logits, torch.load(Path(root) / family / "logits.pt")), family
    base = AutoModel.from_pretrained(Path(root) / family)
    for weight in base.parameters():
        weight.data = weight.data.clone()
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state), family
    print(family, type(model).__name__, type(base).__name__)
"""
    torch.save(token_ids(2, 15), saved / "ids.pt")
    result = run_python(code, saved, *FAMILIES)
    assert result.returncode == 0, result.stderr
    expected = [f"{family} Larosa{name}ForCausalLM Larosa{name}Model" for family, name in CLASSES.items()]
    assert result.stdout.splitlines() == expected


def test_a_tied_head_is_stored_once_unless_the_rotation_unties_it(saved):
    for family, rotation in zip(FAMILIES, ROTATIONS, strict=True):
        names = {name for file in (saved / family).glob("*.safetensors") for name in load_file(file)}
        assert ("lm_head.weight" in names) == (rotation != "none")
        model = AutoModelForCausalLM.from_pretrained(saved / family)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (rotation == "none")
        assert model.config.tie_word_embeddings == (rotation == "none")


def test_checkpoints_are_sharded(saved):
    for family in FAMILIES:
        assert len(list((saved / family).glob("*.safetensors"))) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_in_this_process_in_evaluation_mode_with_the_block(saved, family):
    model = AutoModelForCausalLM.from_pretrained(saved / family, device_map={"": "cpu"})
    assert not any(module.training for module in model.modules())
    assert model.config.larosa["rotation"] == dict(zip(FAMILIES, ROTATIONS, strict=True))[family]
    assert type(model) is getattr(transformers, f"Larosa{CLASSES[family]}ForCausalLM")
    assert isinstance(model.model.layers[0].mlp.down_proj, SparseLinear)
    assert AutoConfig.from_pretrained(saved / family).to_dict()["larosa"] == model.config.larosa


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
def test_quantizers_may_not_replace_the_linears(saved, edited, auto):
    """By those that get so far without a GPU or a package of their own; bitsandbytes finds linears by class, too."""
    with pytest.raises(LarosaError, match="not quantized as it is loaded: leave quantization_config out"):
        auto.from_pretrained(saved / "llama", quantization_config=Mxfp4Config(dequantize=True))
    stored = edited(lambda config: config.update(quantization_config=BitNetQuantConfig().to_dict()))
    with pytest.raises(LarosaError, match="leave quantization_config out"):
        auto.from_pretrained(stored)


@pytest.mark.parametrize("family", FAMILIES)
def test_device_map_gives_the_same_logits(saved, token_ids, family):
    model = realigned(AutoModelForCausalLM.from_pretrained(saved / family, device_map={"": "cpu"}))
    assert torch.equal(model(token_ids(2, 15)).logits, torch.load(saved / family / "logits.pt"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.one_of(3)
def test_saving_what_was_loaded_changes_nothing(make_model, quick_convert, tmp_path, family, rotation):
    first, second = tmp_path / "first", tmp_path / "second"
    quick_convert(make_model(family), rotation=rotation).save_pretrained(first)
    AutoModelForCausalLM.from_pretrained(first).save_pretrained(second)
    for name in ("config.json", "model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_saves_and_loads_layers_that_share_a_rotation(make_model, quick_convert, token_ids, tmp_path, family):
    model = quick_convert(make_model(family), layers_per_rotation=2)
    model.save_pretrained(tmp_path / "out")
    loaded = realigned(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert loaded.config.larosa["layers_per_rotation"] == 2
    assert [name for name in loaded.state_dict() if "adapter" in name] == ["model.layers.0.residual_adapter.weight"]
    assert torch.equal(loaded(token_ids(2, 15)).logits, model(token_ids(2, 15)).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"rotation": "block"}, {"layers_per_rotation": 2}], ids=str)
def test_adapters_read_the_stream_from_before_what_they_go_past(make_model, quick_convert, token_ids, family, options):
    model = quick_convert(make_model(family), **options)
    read = {}

    def listen(module, place):
        module.register_forward_pre_hook(lambda _module, inputs: read.__setitem__(place, inputs[0]))

    layers = list(enumerate(model.model.layers))
    for index, layer in layers:
        for adapter, norm in (("attention", layer.input_layernorm), ("residual", layer.post_attention_layernorm)):
            listen(norm, (index, adapter, "before"))
            if getattr(layer, f"{adapter}_adapter") is not None:
                listen(getattr(layer, f"{adapter}_adapter"), (index, adapter, "read"))
    model(token_ids(2, 9))
    found = [at for at in read if at[2] == "read"]
    assert len(found) == sum(name.endswith("_adapter.weight") for name in model.state_dict()) > 0
    assert all(torch.equal(read[at], read[*at[:2], "before"]) for at in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_survives(make_model, quick_convert, token_ids, tmp_path, dtype):
    model = quick_convert(make_model("llama", dtype))
    model.save_pretrained(tmp_path / "out")
    loaded = realigned(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert loaded.dtype == dtype
    assert torch.equal(loaded(token_ids(1, 9)).logits, model(token_ids(1, 9)).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_the_dense_ones_in_another_basis(make_model, quick_convert, token_ids, family):
    model, ids = make_model(family), token_ids(2, 15)
    expected = model(ids, output_hidden_states=True).hidden_states
    found = quick_convert(model, sparsity=0.0)(ids, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 4
    # Rotations keep lengths and angles. The last state is behind the final norm, whose gain has been folded away.
    for x, y in zip(found[:-1], expected[:-1], strict=True):
        gram, dense_gram = (h.flatten(0, 1) @ h.flatten(0, 1).T for h in (x, y))
        torch.testing.assert_close(gram, dense_gram, rtol=0, atol=1e-4 * float(dense_gram.abs().max()))
        assert not torch.allclose(x, y, atol=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_attentions_are_the_dense_ones(make_model, quick_convert, token_ids, family):
    model, ids = make_model(family, attn_implementation="eager"), token_ids(1, 15)
    expected = model(ids, output_attentions=True).attentions
    found = quick_convert(model, sparsity=0.0)(ids, output_attentions=True).attentions
    assert len(found) == len(expected) == 3
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_does_not_depend_on_the_cache(make_model, quick_convert, token_ids, family):
    model = quick_convert(make_model(family, torch.float64), rotation="block")
    outputs = [
        model.generate(token_ids(2, 10), max_new_tokens=20, min_new_tokens=20, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert outputs[0].shape == (2, 30)
    assert torch.equal(*outputs)


def test_converted_and_loaded_models_generate_alike(make_model, quick_convert, token_ids, tmp_path):
    model = quick_convert(make_model("qwen2"))
    model.save_pretrained(tmp_path / "out")
    loaded = realigned(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    options = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(token_ids(1, 10), **options), loaded.generate(token_ids(1, 10), **options))


def test_text_generation_pipeline(saved, tokenizer, words):
    model = AutoModelForCausalLM.from_pretrained(saved / "qwen3")
    prompt = words(8)
    output = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        prompt, max_new_tokens=6, do_sample=False, return_tensors=True
    )
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert output[0]["generated_token_ids"] == model.generate(ids, max_new_tokens=6, do_sample=False)[0].tolist()


def test_pipeline_loads_a_checkpoint_by_its_path(saved, words):
    output = pipeline("text-generation", model=str(saved / "mistral"))(words(8), max_new_tokens=4, do_sample=False)
    assert output[0]["generated_text"].startswith(words(8))


def test_copies_are_whole(saved, token_ids):
    model = AutoModelForCausalLM.from_pretrained(saved / "llama")
    twin = copy.deepcopy(model)
    expected = realigned(model)(token_ids(1, 9)).logits
    model.model.layers[0].h1.k = 1
    assert torch.equal(twin(token_ids(1, 9)).logits, expected)


def test_state_dict_goes_through_torch_save(saved, token_ids):
    model = realigned(AutoModelForCausalLM.from_pretrained(saved / "mistral"))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = AutoModelForCausalLM.from_config(model.config).eval()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(token_ids(1, 9)).logits, model(token_ids(1, 9)).logits)


def test_padding_on_the_left_changes_nothing(saved, token_ids):
    model = AutoModelForCausalLM.from_pretrained(saved / "smollm3", dtype=torch.float64)
    ids = token_ids(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], 1)
    mask = (torch.arange(13) >= 4).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=1e-4)


def test_lm_eval_scores_it(saved, tokenizer, words):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = AutoModelForCausalLM.from_pretrained(saved / "llama")
    pairs = [(words(7, seed=i), " " + words(3 + i, seed=10 + i)) for i in range(4)]
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]
    found = harness.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (loglikelihood, is_greedy) in zip(pairs, found, strict=True):
        start = len(tokenizer(context).input_ids)
        ids = tokenizer(context + continuation, return_tensors="pt").input_ids
        log_p = model(ids).logits[0].detach().double().log_softmax(-1)
        targets = ids[0, start:]
        expected = log_p[start - 1 : -1].gather(-1, targets[:, None]).sum()
        assert loglikelihood == pytest.approx(float(expected), rel=1e-5)
        assert is_greedy == bool((log_p[start - 1 : -1].argmax(-1) == targets).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["larosa"].update(surprise=1), r"larosa\.surprise"),
        (lambda c: c["larosa"].update(format_version=3), "format version 3.*pip install --upgrade larosa"),
        (lambda c: c["larosa"].update(sparsity=50), r"larosa\.sparsity"),
        (lambda c: c["larosa"].pop("keep"), r"larosa\.thresholds"),
        (lambda c: c.pop("larosa"), "no 'larosa' block"),
        (lambda c: c["larosa"].update(keep={s: [3, 3] for s in ("h1", "h2", "h3", "h4")}), "2 layers, the model has 3"),
        (lambda c: c["larosa"]["keep"]["h4"].__setitem__(1, 57), r"larosa\.keep.*h4.*57"),
        (lambda c: c.update(tie_word_embeddings=True), "'tie_word_embeddings': must be false, for the rotation"),
    ],
    ids=["unknown-key", "newer", "bad-value", "missing-key", "no-block", "layers", "count", "tied"],
)
def test_a_bad_configuration_is_refused_by_its_key(edited, change, message):
    with pytest.raises(LarosaError, match=message):
        AutoModelForCausalLM.from_pretrained(edited(change))


def test_base_model_of_a_bad_configuration_is_refused_too(edited):
    with pytest.raises(LarosaError, match=r"larosa\.sparsity"):
        AutoModel.from_pretrained(edited(lambda c: c["larosa"].update(sparsity=50)))


def test_dense_checkpoints_load_as_before(make_model, token_ids, tmp_path):
    # Registering the sparsified families must not touch the dense ones.
    model = make_model("qwen2")
    model.save_pretrained(tmp_path / "dense")
    loaded = realigned(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    assert type(loaded) is transformers.Qwen2ForCausalLM
    assert torch.equal(loaded(token_ids(1, 9)).logits, model(token_ids(1, 9)).logits)


def test_a_dense_model_beside_a_converted_one_stays_dense(make_model, quick_convert, token_ids):
    dense, ids = make_model("llama"), token_ids(1, 9)
    expected = dense(ids).logits
    quick_convert(make_model("llama"), sparsity=0.9)
    assert torch.equal(dense(ids).logits, expected)
    assert torch.equal(make_model("llama")(ids).logits, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_loads_onto_cuda_by_device_map(saved, token_ids, family):
    model = AutoModelForCausalLM.from_pretrained(saved / family, device_map="auto", dtype=torch.float64)
    assert all(weight.is_cuda for weight in model.parameters())
    expected = AutoModelForCausalLM.from_pretrained(saved / family, dtype=torch.float64)(token_ids(2, 15)).logits
    found = model(token_ids(2, 15).cuda()).logits.cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.gpu
def test_splits_layers_between_cuda_and_cpu(saved, token_ids):
    # Layers are found by their class name when a model is split.
    devices = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": "cpu", "lm_head": "cpu"}
    devices |= {"model.layers.0": 0, "model.layers.1": 0, "model.layers.2": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(saved / "llama", device_map=devices, dtype=torch.float64)
    expected = AutoModelForCausalLM.from_pretrained(saved / "llama", dtype=torch.float64)(token_ids(2, 15)).logits
    found = model(token_ids(2, 15).cuda()).logits.cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
