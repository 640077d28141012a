"""Checkpoints in processes that have not imported larosa: they load by their shim or are refused, never dense."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from larosa.models import SparseLinear, families

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
#: `auto_map` of checkpoints from before there was a shim.
OLD_HINT = (
    "This checkpoint needs larosa: run `pip install larosa` and `import larosa` before loading it; no remote code"
)


@pytest.fixture(scope="module")
def saved(make_model, quick_convert, token_ids, tokenizer, tmp_path_factory):
    """A folder with a checkpoint of each family, and what the first gives for ids.pt in logits.pt."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.save(token_ids(2, 15), root / "ids.pt")
    for family in FAMILIES:
        model = quick_convert(make_model(family))
        model.save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
        if family == "llama":
            torch.save(model(token_ids(2, 15)).logits, root / "logits.pt")
    return root


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def python(environment):
    """python(code, ...): run code in a fresh process and give what it has printed."""

    def run(code, *arguments):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def old(saved, tmp_path):
    """A checkpoint from before there was a shim."""
    shutil.copytree(saved / "llama", tmp_path / "old")
    (tmp_path / "old" / "modeling_larosa.py").unlink()
    file = tmp_path / "old" / "config.json"
    config = json.loads(file.read_text("utf-8"))
    config["auto_map"] = {
        auto: f"{OLD_HINT}--larosa.{name.rpartition('.')[2]}" for auto, name in config["auto_map"].items()
    }
    file.write_text(json.dumps(config), "utf-8")
    return tmp_path / "old"


def test_remote_code_loads_every_family_bit_by_bit(saved, python):
    code = """
import sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
root, *families = sys.argv[1:]
torch.set_num_threads(1)
for family in families:
    assert family != families[0] or "larosa" not in sys.modules
    model = AutoModelForCausalLM.from_pretrained(Path(root) / family, trust_remote_code=True)
    base = AutoModel.from_pretrained(Path(root) / family, trust_remote_code=True)
    config = AutoConfig.from_pretrained(Path(root) / family, trust_remote_code=True)
    assert type(model.config) is type(config)
    print(type(model).__module__, type(model).__name__, type(base).__name__, type(config).__name__)
    if family == families[0]:
        for weight in model.parameters():
            weight.data = weight.data.clone()  # another alignment can mean other last bits
        assert torch.equal(model(torch.load(Path(root) / "ids.pt")).logits, torch.load(Path(root) / "logits.pt"))
"""
    names = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")
    expected = [f"larosa.models Larosa{name}ForCausalLM Larosa{name}Model Larosa{name}Config" for name in names]
    assert python(code, saved, *FAMILIES).splitlines() == expected


def test_without_the_import_and_without_trust_it_is_refused(saved, python):
    code = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
answers = []
for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):
    for trust in (None, False):
        try:
            auto.from_pretrained(sys.argv[1], trust_remote_code=trust)
        except ValueError as error:
            answers.append("contains custom code" in str(error) and "trust_remote_code=True" in str(error))
        else:
            answers.append("loaded")
assert "larosa" not in sys.modules
print("answers", answers)
"""
    assert f"answers {[True] * 6}" in python(code, saved / "llama")


def test_where_larosa_is_not_installed_one_line_says_how(saved, python):
    code = """
import importlib.abc, sys
from transformers import AutoModelForCausalLM
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "larosa":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
except ImportError as error:
    print(error)
"""
    (line,) = python(code, saved / "llama").splitlines()
    assert "pip install larosa" in line


class TestOldCheckpoints:
    @pytest.mark.parametrize("trust", [None, True, False])
    def test_load_after_the_import(self, old, saved, trust, monkeypatch, tmp_path):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        model = AutoModelForCausalLM.from_pretrained(old, trust_remote_code=trust)
        assert type(model).__name__ == "LarosaLlamaForCausalLM"
        model.save_pretrained(tmp_path / "again")
        for name in ("config.json", "modeling_larosa.py"):
            assert (tmp_path / "again" / name).read_bytes() == (saved / "llama" / name).read_bytes()

    def test_say_what_they_need_without_it(self, old, python):
        code = """
import sys
from transformers import AutoModelForCausalLM
for trust in (None, True, False):
    try:
        AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=trust)
    except Exception as error:
        print("pip install larosa" in str(error))
assert "larosa" not in sys.modules
"""
        assert python(code, old).count("True\n") == 3


def entry_point_of_vllm():
    """Its name and what it leads to."""
    pyproject = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text("utf-8"))
    ((name, value),) = pyproject["project"]["entry-points"]["vllm.general_plugins"].items()
    return name, value


class TestTools:
    """In processes of their own, given no more than the folder and `trust_remote_code`."""

    @pytest.mark.slow
    def test_a_pipeline_saving_and_the_trainers_evaluation(self, saved, python, words, tmp_path):
        code = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, pipeline
root, out, prompt = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
options = {"max_new_tokens": 6, "do_sample": False, "return_tensors": True}
output = pipeline("text-generation", model=str(root / "mistral"), trust_remote_code=True)(prompt, **options)
print("tokens", *output[0]["generated_token_ids"])
model = AutoModelForCausalLM.from_pretrained(root / "llama", trust_remote_code=True)
model.save_pretrained(out / "again")
rows = [{"input_ids": row, "labels": row} for row in torch.load(root / "ids.pt")]
arguments = TrainingArguments(out / "trainer", use_cpu=True, report_to=[], disable_tqdm=True)
print("loss", Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"])
"""
        lines = [line.split() for line in python(code, saved, tmp_path, words(8)).splitlines()]
        printed = {line[0]: line[1:] for line in lines if line}
        model = AutoModelForCausalLM.from_pretrained(saved / "mistral")
        ids = torch.tensor([[int(word[1:]) for word in words(8).split()]])
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0].tolist()
        assert printed["tokens"] == [str(token) for token in expected]
        logits, ids = torch.load(saved / "logits.pt"), torch.load(saved / "ids.pt")
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert float(printed["loss"][0]) == pytest.approx(float(loss), rel=1e-5)
        names = {file.name for file in (tmp_path / "again").iterdir()}
        assert names == {"config.json", "generation_config.json", "model.safetensors", "modeling_larosa.py"}
        for name in ("config.json", "model.safetensors", "modeling_larosa.py"):
            assert (tmp_path / "again" / name).read_bytes() == (saved / "llama" / name).read_bytes()

    @pytest.mark.slow
    def test_lm_evals_command_line(self, saved, environment, words, tmp_path):
        pytest.importorskip("lm_eval")
        rows = [
            {"text": words(6, seed), "choices": [words(2, 10 + seed), words(3, 20 + seed)], "label": seed % 2}
            for seed in range(4)
        ]
        (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)), "utf-8")
        (tmp_path / "words.yaml").write_text(
            "task: words\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
            f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.json'}\n"
            "doc_to_text: text\ndoc_to_choice: choices\ndoc_to_target: label\n",
            "utf-8",
        )
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--tasks", "words"]
        command += ["--model_args", f"pretrained={saved / 'llama'},trust_remote_code=True,dtype=float32"]
        command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        (file,) = (tmp_path / "out").rglob("samples_words_*.jsonl")
        samples = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        assert len(samples) == len(rows)
        model = AutoModelForCausalLM.from_pretrained(saved / "llama")
        for sample in samples:
            row = sample["doc"]
            for choice, (answer,) in zip(row["choices"], sample["resps"], strict=True):
                context, ids = ([int(word[1:]) for word in text.split()] for text in (row["text"], choice))
                log_p = model(torch.tensor([context + ids])).logits[0, len(context) - 1 : -1].log_softmax(-1)
                expected = log_p.gather(1, torch.tensor(ids)[:, None]).sum().item()
                assert float(answer[0]) == pytest.approx(expected, rel=1e-4)

    def test_the_entry_point_of_vllm(self):
        assert EntryPoint(*entry_point_of_vllm(), "vllm.general_plugins").load() is families.register_families

    @pytest.mark.slow
    def test_the_entry_point_of_vllm_in_its_processes(self, saved, python):
        """Each runs it, and makes transformers know the families, twice as well as once."""
        code = """
import sys, transformers
from importlib.metadata import EntryPoint
plugin = EntryPoint("larosa", sys.argv[2], "vllm.general_plugins").load()
plugin()
plugin()
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
base = transformers.AutoModel.from_config(config)
print(getattr(transformers, config.architectures[0]).__name__, base._supports_attention_backend)
"""
        assert python(code, saved / "llama", entry_point_of_vllm()[1]).split() == ["LarosaLlamaForCausalLM", "True"]


def test_what_replaces_linears_does_not_drop_the_selection(saved, token_ids):
    """As quantizers and vLLM do: every `nn.Linear` gives way to one of theirs with the same weights."""

    class Theirs(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight, self.bias = linear.weight, linear.bias

        def forward(self, x):
            return nn.functional.linear(x, self.weight, self.bias)

    model = AutoModelForCausalLM.from_pretrained(saved / "llama").double()
    expected = model(token_ids(1, 12)).logits
    replaced = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Theirs(child))
                replaced += 1
    assert replaced == 3 * 5 + 2 + 1  # q, k, v, gate and up of three layers, the adapters between them, the head
    assert sum(isinstance(module, SparseLinear) for module in model.modules()) == 3 * 2
    assert torch.equal(model(token_ids(1, 12)).logits, expected)


def test_the_configuration_names_what_the_shim_has(saved):
    for family in FAMILIES:
        assert (saved / family / "modeling_larosa.py").read_bytes() == families.SHIM.read_bytes()
        auto_map = AutoConfig.from_pretrained(saved / family).auto_map
        assert auto_map.keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
        assert {name.partition(".")[0] for name in auto_map.values()} == {"modeling_larosa"}
