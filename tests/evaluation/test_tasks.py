import json
import lzma
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import larosa
from larosa import LarosaError
from larosa.evaluation.tasks import PAPER_TASKS, ZERO_SHOT_TASKS, evaluate_tasks
from larosa.evaluation.tasks.local import read_task
from larosa.evaluation.zeros import ZeroCounter

pytest.importorskip("lm_eval")

import datasets
from tests.evaluation.task_example import ITEMS, STOCK, SUBJECTS, Example, Texts, lines, mmlu_archive, put

from larosa.evaluation.tasks import harness
from larosa.evaluation.tasks.catalogue import CATALOGUE


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return Example(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def bpe():
    return AutoTokenizer.from_pretrained(Path(larosa.__file__).parent / "assets" / "larosa-tiny")


@pytest.fixture(scope="module")
def dense(make_model, bpe):
    return make_model("llama", vocab_size=len(bpe), max_position_embeddings=768)


@pytest.fixture(scope="module")
def measured(dense, bpe, example):
    return evaluate_tasks(dense, bpe, data=example.folder)


def requests_of(task, documents):
    """What our path asks the model: by leaf task, for each item its (prompt, answer) pairs."""
    loaded = harness.load_local(CATALOGUE[task], documents)
    result = {}
    for name, leaf in loaded.tasks.items():
        leaf.set_config(key="num_fewshot", value=CATALOGUE[task].num_fewshot)
        leaf.build_all_requests(rank=0, world_size=1)
        items = {}
        for instance in leaf.instances:
            items.setdefault(instance.doc_id, []).append(instance.args)
        result[name] = [items[number] for number in sorted(items)]
    return result


@pytest.mark.parametrize("task", PAPER_TASKS)
def test_requests_are_the_stock_ones(task, example):
    for name, items in requests_of(task, read_task(task, example.folder)).items():
        assert items == [pairs for pairs, _, _ in example.requests[name]]


def test_a_document_written_out(tmp_path):
    put(
        tmp_path / "hellaswag" / "val.jsonl.xz",
        lzma.compress(
            lines(
                [
                    {
                        "activity_label": "Sailing",
                        "ctx": 'Two people sit in a boat. One says "row!" the other One',
                        "label": 1,
                        "endings": ["rows.", "sleeps [here]  on."],
                    }
                ]
            ).encode()
        ),
    )
    prompt = 'Sailing: Two people sit in a boat. One says "row!" The other one'
    assert requests_of("hellaswag", read_task("hellaswag", tmp_path)) == {
        "hellaswag": [[(prompt, " rows."), (prompt, " sleeps  on.")]]
    }


@torch.inference_mode()
def log_likelihood(model, tokenizer, prompt, answer):
    """The sum of the log-probabilities of the answer's tokens after the prompt's."""
    start = len(tokenizer(prompt).input_ids)
    ids = torch.tensor([tokenizer(prompt + answer).input_ids])
    log_p = model(ids).logits[0].double().log_softmax(-1)
    return sum(float(log_p[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))


def by_hand(model, tokenizer, items, normalised):
    """1 or 0 for each item, from the definition."""
    scores = []
    for pairs, lengths, gold in items:
        values = [log_likelihood(model, tokenizer, *pair) for pair in pairs]
        if normalised:
            values = [value / length for value, length in zip(values, lengths, strict=True)]
        scores.append(int(max(range(len(values)), key=values.__getitem__) == gold))
    return tuple(scores)


@pytest.mark.parametrize("task", [*ZERO_SHOT_TASKS, pytest.param("mmlu", marks=pytest.mark.slow)])  # long prompts
def test_scores_equal_a_computation_by_hand(task, dense, bpe, example, measured):
    names = [f"mmlu_{subject}" for subject in SUBJECTS] if task == "mmlu" else [task]
    items = [item for name in names for item in example.requests[name]]
    result = measured[task]
    assert result.metric == ("acc" if task in ("winogrande", "boolq", "mmlu") else "acc_norm")
    assert result.num_fewshot == (5 if task == "mmlu" else 0)
    assert result.scores == by_hand(dense, bpe, items, result.metric == "acc_norm")
    assert result.value == pytest.approx(sum(result.scores) / len(items))
    assert result.items == result.total_items == len(items)
    assert result.chance == pytest.approx(sum(1 / len(pairs) for pairs, _, _ in items) / len(items))
    assert result.truncated_prompts == 0
    if task != "mmlu":
        p, n = result.value, len(items)
        assert result.stderr == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))


def test_the_scores_say_something(measured):
    """A test of scores that are all alike would prove nothing."""
    assert all(0 < result.value < 1 for result in measured.results.values())


def test_acc7_is_the_plain_mean_of_the_seven(measured):
    seven = [measured[task] for task in ZERO_SHOT_TASKS]
    assert len(seven) == 7
    assert "mmlu" not in ZERO_SHOT_TASKS
    assert measured.acc7 == pytest.approx(sum(result.value for result in seven) / 7)
    assert measured.acc7_stderr == pytest.approx(math.sqrt(sum(result.stderr**2 for result in seven)) / 7)
    saved = json.loads(json.dumps(measured.to_dict()))
    assert saved["acc7"] == measured.acc7
    assert set(saved["tasks"]) == set(PAPER_TASKS)
    assert "scores" not in saved["tasks"]["piqa"]


def test_acc7_needs_all_seven(dense, bpe, example):
    result = evaluate_tasks(dense, bpe, ["piqa"], data=example.folder, limit=1)
    assert (result.acc7, result.acc7_stderr, result.acc7_chance) == (None, None, None)
    assert result["piqa"].stderr is None  # lm-eval gives none for one item


def test_a_limit_takes_the_first_items_of_a_task_or_subject(dense, bpe, example, measured):
    limit = {"piqa": 3, "mmlu": 1}
    result = evaluate_tasks(dense, bpe, ["piqa", "mmlu", "boolq"], data=example.folder, limit=limit)
    assert result["piqa"].scores == measured["piqa"].scores[:3]
    assert result["piqa"].total_items == ITEMS
    assert result["mmlu"].items == len(SUBJECTS)
    assert result["boolq"].scores == measured["boolq"].scores
    assert result.to_dict()["limit"] == limit


def test_batches_and_company_do_not_matter(dense, bpe, example, measured):
    alone = evaluate_tasks(dense, bpe, ["hellaswag"], data=str(example.folder), batch_size=1)
    assert alone["hellaswag"].scores == measured["hellaswag"].scores


@pytest.fixture
def stock_data(example, monkeypatch):
    """lm-eval's downloads answered with the original form of the example."""
    paths = {
        "allenai/winogrande": "winogrande",
        "baber/piqa": "piqa",
        "allenai/openbookqa": "openbookqa",
        "Rowan/hellaswag": "hellaswag",
        "aps/super_glue": "boolq",
    }

    def load_dataset(path, name=None, **_):
        if path == "cais/mmlu":
            task = f"mmlu_{name}"
        elif path == "allenai/ai2_arc":
            task = {"ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge"}[name]
        else:
            task = paths[path]
        splits = {split: datasets.Dataset.from_list(items) for split, items in example.original[task].items()}
        some = next(iter(splits.values()))
        return datasets.DatasetDict({"train": some, "validation": some, **splits})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_local_files_give_what_the_stock_tasks_give(dense, bpe, measured, stock_data):
    stock = evaluate_tasks(dense, bpe)
    assert stock.results == measured.results
    assert stock.data == "lm-eval"


@pytest.mark.slow
def test_scores_equal_lm_evals_command_line(dense, bpe, example, measured, tmp_path):
    """Item for item, on a saved model, for data in its original form read by lm-eval itself."""
    subjects = SUBJECTS[:2]
    names = [*ZERO_SHOT_TASKS, *(f"mmlu_{subject}" for subject in subjects)]
    dense.save_pretrained(tmp_path / "model")
    bpe.save_pretrained(tmp_path / "model")
    for name in names:
        folder = "mmlu/default" if name.startswith("mmlu") else CATALOGUE[name].folder
        file = "default" if name in ("boolq", "winogrande") else name
        splits = example.original[name]
        for split, items in splits.items():
            put(tmp_path / "data" / f"{name}-{split}.json", lines(items))
        definition = [
            f"include: {STOCK / folder / file}.yaml",
            f"task: {name}",
            "dataset_path: json",
            "dataset_name: null",
            "training_split: null",
            f"validation_split: {'validation' if 'validation' in splits else 'null'}",
            "dataset_kwargs:",
            "  data_files:",
            *(f"    {split}: {tmp_path / 'data' / f'{name}-{split}.json'}" for split in splits),
            *(["num_fewshot: 5"] if name.startswith("mmlu") else []),
        ]
        put(tmp_path / "tasks" / f"{name}.yaml", "\n".join(definition))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "8"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},dtype=float32"]
    command += ["--include_path", str(tmp_path / "tasks"), "--tasks", ",".join(names)]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    logged = {}
    for name in names:
        (path,) = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        samples = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        logged[name] = sorted(samples, key=lambda sample: sample["doc_id"])
        asked = [[tuple(pair.values()) for pair in sample["arguments"].values()] for sample in logged[name]]
        assert asked == [pairs for pairs, _, _ in example.requests[name]]
    for task in ZERO_SHOT_TASKS:
        assert tuple(int(sample[measured[task].metric]) for sample in logged[task]) == measured[task].scores
    ours = iter(measured["mmlu"].scores)
    for subject in subjects:
        theirs = [int(sample["acc"]) for sample in logged[f"mmlu_{subject}"]]
        assert theirs == [next(ours) for _ in theirs]


def test_prompts_are_sparse_whatever_the_prefill_setting(make_model, bpe, example, tmp_path):
    put(tmp_path / "text.txt", Texts(1).phrase(600, 600))
    model = make_model("llama", vocab_size=len(bpe), max_position_embeddings=768)
    calibration = {"calibration": str(tmp_path / "text.txt"), "num_sequences": 4, "sequence_length": 64}
    larosa.convert(model, bpe, sparsity=0.5, search="none", prefill="dense", **calibration)
    with ZeroCounter(model) as zeros:
        evaluate_tasks(model, bpe, ["piqa"], data=example.folder)
    assert all(site.min > 0.2 for site in zeros.fractions().values())


def test_prompts_beyond_the_context_are_counted(make_model, bpe, example):
    model = make_model("llama", vocab_size=len(bpe), max_position_embeddings=24)
    result = evaluate_tasks(model, bpe, ["boolq", "piqa"], data=example.folder)
    tokens = [len(bpe(pairs[0][0] + " no").input_ids) for pairs, _, _ in example.requests["boolq"]]
    assert result["boolq"].truncated_prompts == sum(count > 25 for count in tokens) > 0


def test_standard_output_stays_clean_and_the_tokenizer_as_it_was(dense, bpe, example, capsys):
    before = bpe.pad_token, bpe.padding_side
    bpe.pad_token = None
    try:
        evaluate_tasks(dense, bpe, ["piqa", "mmlu"], data=example.folder, limit=1)
        assert bpe.pad_token is None
    finally:
        bpe.pad_token, bpe.padding_side = before
    assert capsys.readouterr() == ("", "")


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def test_unknown_tasks_and_bad_numbers_are_refused(dense, bpe, example):
    with pytest.raises(LarosaError, match=r"unknown task 'arc'; known ones: winogrande, piqa") as error:
        evaluate_tasks(dense, bpe, ["arc"], data=example.folder)
    one_line(error)
    with pytest.raises(LarosaError, match="no task was named"):
        evaluate_tasks(dense, bpe, [], data=example.folder)
    with pytest.raises(LarosaError, match="unknown task 'mlu'"):
        evaluate_tasks(dense, bpe, data=example.folder, limit={"mlu": 3})
    with pytest.raises(LarosaError, match="limit of 'piqa' must be at least 1"):
        evaluate_tasks(dense, bpe, ["piqa"], data=example.folder, limit=0)
    with pytest.raises(LarosaError, match="batch size"):
        evaluate_tasks(dense, bpe, ["piqa"], data=example.folder, batch_size=0)


def test_a_failed_download_is_one_line(dense, bpe, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the hub\n(see above)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(LarosaError, match=r"data of 'piqa' cannot be downloaded \(Couldn't reach") as error:
        evaluate_tasks(dense, bpe, ["piqa"])
    one_line(error)


def test_without_lm_eval_the_extra_is_named(dense, bpe, example, monkeypatch):
    monkeypatch.delitem(sys.modules, "larosa.evaluation.tasks.harness")
    monkeypatch.delattr(sys.modules["larosa.evaluation.tasks"], "harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LarosaError, match=r"pip install 'larosa\[lm-eval\]'"):
        evaluate_tasks(dense, bpe, ["piqa"], data=example.folder)


def test_nan_stops(make_model, bpe, example):
    model = make_model("llama", vocab_size=len(bpe))
    model.lm_head.weight.fill_(math.nan)
    with pytest.raises(LarosaError, match="NaN"):
        evaluate_tasks(model, bpe, ["piqa"], data=example.folder)


def test_a_subject_that_lacks_is_named(dense, bpe, tmp_path):
    item = ("two plus two", ["1", "2", "3", "4"], 3)
    rows = {"test": {"anatomy": [item]}, "dev": {"anatomy": [item] * 5}}
    put(tmp_path / "mmlu" / "mmlu_test_dev.tar.xz", mmlu_archive(rows))
    with pytest.raises(LarosaError, match="lack the subject 'abstract_algebra'"):
        evaluate_tasks(dense, bpe, ["mmlu"], data=tmp_path)


@pytest.mark.skipif("LAROSA_DATA" not in os.environ, reason="LAROSA_DATA names no folder of real task files")
def test_real_files_load_whole(bpe, dense):
    result = evaluate_tasks(dense, bpe, data=os.environ["LAROSA_DATA"], limit=1)
    counts = {task: measured.total_items for task, measured in result.results.items()}
    assert counts == {
        "winogrande": 1267,
        "piqa": 1838,
        "openbookqa": 500,
        "hellaswag": 10042,
        "boolq": 3270,
        "arc_easy": 2376,
        "arc_challenge": 1172,
        "mmlu": 14042,
    }
