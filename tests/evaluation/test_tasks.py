import csv
import io
import json
import lzma
import math
import os
import random
import subprocess
import sys
import tarfile
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
import lm_eval.tasks

from larosa.evaluation.tasks import harness
from larosa.evaluation.tasks.catalogue import CATALOGUE

ITEMS = 8
STOCK = Path(lm_eval.tasks.__file__).parent
SUBJECTS = sorted(path.stem.removeprefix("mmlu_") for path in (STOCK / "mmlu" / "default").glob("mmlu_*.yaml"))
_WORDS = [
    "river",
    "stone",
    "light",
    "water",
    "plant",
    "green",
    "house",
    "animal",
    "sound",
    "metal",
    "small",
    "cloud",
    "winter",
    "paper",
    "energy",
    "children",
    "mountain",
    "window",
    "music",
    "garden",
    "bread",
    "silver",
    "letter",
    "summer",
    "engine",
    "forest",
]


class Texts:
    """Random phrases, the same for the same seed."""

    def __init__(self, seed):
        self._chance = random.Random(seed)

    def phrase(self, low=2, high=7):
        return " ".join(self._chance.choices(_WORDS, k=self._chance.randint(low, high)))

    def index(self, count):
        return self._chance.randrange(count)


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def mmlu_archive(rows):
    """rows: {'test' or 'dev': {subject: [(question, four choices, answer)]}} as the .tar.xz."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for split, subjects in rows.items():
            for subject, items in subjects.items():
                text = io.StringIO(newline="")
                writer = csv.writer(text)
                writer.writerow(["question", *(f"choice{i}" for i in range(4)), "answer"])
                writer.writerows([question, *choices, answer] for question, choices, answer in items)
                content = text.getvalue().encode()
                info = tarfile.TarInfo(f"{split}/{subject}_{split}.csv")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


class Example:
    """Random items of every task: as local files, as the original data sets, and as expected requests.

    `requests[task]` has for each item its [(prompt, answer)], the lengths that normalise them, and the
    index of the right one, written down from lm-eval's documented prompts. MMLU's go by subject.
    """

    def __init__(self, folder, items=ITEMS):
        self.folder = folder
        self.original = {}
        self.requests = {}
        texts = Texts(3)
        for task, file in (("arc_easy", "arc_easy_test.jsonl"), ("arc_challenge", "arc_challenge_test.jsonl")):
            self._multiple_choice(task, folder / "arc" / file, "question", "Question: {}\nAnswer:", texts, items)
        self._multiple_choice("openbookqa", folder / "openbookqa" / "test.jsonl", "question_stem", "{}", texts, items)
        self._piqa(texts, items)
        self._boolq(texts, items)
        self._winogrande(texts, items)
        self._hellaswag(texts, items)
        self._mmlu(texts)

    def _multiple_choice(self, task, path, key, prompt, texts, items):
        local, original, requests = [], [], []
        for number in range(items):
            question, choices = texts.phrase(3, 8) + "?", [texts.phrase() for _ in range(3 + number % 3)]
            gold, letters = texts.index(len(choices)), "ABCDE"[: len(choices)]
            local.append({key: question, "choices": choices, "gold": gold})
            original.append(
                {key: question, "choices": {"text": choices, "label": list(letters)}, "answerKey": letters[gold]}
            )
            requests.append(
                ([(prompt.format(question), f" {choice}") for choice in choices], [len(c) for c in choices], gold)
            )
        put(path, lines(local))
        self.original[task], self.requests[task] = {"test": original}, requests

    def _piqa(self, texts, items):
        original, requests = [], []
        for _ in range(items):
            goal, first, second, gold = texts.phrase(), texts.phrase(), texts.phrase(), texts.index(2)
            original.append({"goal": goal, "sol1": first, "sol2": second, "label": gold})
            prompt = f"Question: {goal}\nAnswer:"
            requests.append(([(prompt, f" {first}"), (prompt, f" {second}")], [len(first), len(second)], gold))
        put(self.folder / "piqa" / "valid.jsonl", lines({k: d[k] for k in ("goal", "sol1", "sol2")} for d in original))
        put(self.folder / "piqa" / "valid-labels.lst", "".join(f"{d['label']}\n" for d in original))
        self.original["piqa"], self.requests["piqa"] = {"validation": original}, requests

    def _boolq(self, texts, items):
        local, original, requests = [], [], []
        for number in range(items):
            question, passage, answer = f"is {texts.phrase()}", texts.phrase(8, 12) + ".", texts.index(2)
            # The local copy ends its questions with a mark, Google's own file does not but has the title apart.
            if number % 2:
                local.append({"question": question + "?", "passage": passage, "answer": bool(answer)})
            else:
                local.append({"question": question, "title": "Stone", "passage": passage, "answer": bool(answer)})
                passage = f"Stone -- {passage}"
            original.append({"question": question, "passage": passage, "label": answer})
            prompt = f"{passage}\nQuestion: {question}?\nAnswer:"
            requests.append(([(prompt, " no"), (prompt, " yes")], [2, 3], answer))
        put(self.folder / "boolq" / "dev.jsonl", lines(local))
        self.original["boolq"], self.requests["boolq"] = {"validation": original}, requests

    def _winogrande(self, texts, items):
        original, requests = [], []
        for _ in range(items):
            before, after, one, two = texts.phrase(), texts.phrase() + ".", texts.phrase(1, 1), texts.phrase(1, 2)
            gold = texts.index(2)
            original.append(
                {"sentence": f"{before} _ {after}", "option1": one, "option2": two, "answer": str(gold + 1)}
            )
            # Partial scoring: the same ending after either option.
            requests.append(
                ([(f"{before} {one}", f" {after}"), (f"{before} {two}", f" {after}")], [len(one), len(two)], gold)
            )
        put(self.folder / "winogrande" / "dev.jsonl", lines(original))
        self.original["winogrande"], self.requests["winogrande"] = {"validation": original}, requests

    def _hellaswag(self, texts, items):
        local, original, requests = [], [], []
        for number in range(items):
            label, first, endings = texts.phrase(1, 2), texts.phrase().capitalize() + ".", []
            second = f"the {texts.phrase(1, 2)}" if number % 2 else ""  # ActivityNet has one, WikiHow has none
            endings = [texts.phrase() + "." for _ in range(4)]
            gold = texts.index(4)
            joined = f"{first} {second}".strip()
            apart = {"ctx_a": first, "ctx_b": second} if number % 3 == 2 else {}  # as in the original data set
            local.append({"activity_label": label, "ctx": joined, **apart, "label": gold, "endings": endings})
            original.append(
                {"activity_label": label, "ctx_a": first, "ctx_b": second, "label": str(gold), "endings": endings}
            )
            prompt = f"{label}: {first} {second.capitalize()}".strip()
            requests.append(([(prompt, f" {ending}") for ending in endings], [len(e) for e in endings], gold))
        put(self.folder / "hellaswag" / "val.jsonl.xz", lzma.compress(lines(local).encode()))
        self.original["hellaswag"], self.requests["hellaswag"] = {"validation": original}, requests

    def _mmlu(self, texts):
        def some(count):
            return [
                (f" {texts.phrase(1, 3)} =", [texts.phrase(1, 1) for _ in range(3)] + ["1,2"], texts.index(4))
                for _ in range(count)
            ]

        rows = {"test": {s: some(2 + (i % 2)) for i, s in enumerate(SUBJECTS)}, "dev": {s: some(5) for s in SUBJECTS}}
        put(self.folder / "mmlu" / "mmlu_test_dev.tar.xz", mmlu_archive(rows))
        for subject in SUBJECTS:
            name = f"mmlu_{subject}"
            self.original[name] = {
                split: [
                    {"question": question, "choices": choices, "answer": answer}
                    for question, choices, answer in rows[split][subject]
                ]
                for split in rows
            }
            shots = "".join(
                f"{self._mmlu_question(question, choices)} {'ABCD'[answer]}\n\n"
                for question, choices, answer in rows["dev"][subject]
            )
            about = "The following are multiple choice questions (with answers) about "
            about += subject.replace("_", " ") + ".\n\n"
            self.requests[name] = [
                (
                    [(f"{about}{shots}{self._mmlu_question(question, choices)}", f" {letter}") for letter in "ABCD"],
                    [1] * 4,
                    answer,
                )
                for question, choices, answer in rows["test"][subject]
            ]

    @staticmethod
    def _mmlu_question(question, choices):
        listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", choices, strict=True))
        return f"{question.strip()}\n{listed}Answer:"


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


@pytest.mark.parametrize("task", PAPER_TASKS)
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
