"""Small data for every task of the paper: the files that larosa reads, and the same items in their original form."""

import csv
import io
import json
import lzma
import random
import tarfile
from pathlib import Path

import lm_eval.tasks

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
