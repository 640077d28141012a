"""Task files that are missing or malformed: one line that names the file and the line."""

import io
import json
import lzma
import tarfile

import pytest

from larosa import LarosaError
from larosa.evaluation.tasks.local import read_task, split_context

ARC = {"question": "why?", "choices": ["a", "b", "c"], "gold": 1}
BOOLQ = {"question": "is it?", "passage": "It is.", "answer": True}
WINOGRANDE = {"sentence": "The _ fell.", "option1": "cup", "option2": "jar", "answer": "1"}
OBQA = {"question_stem": "Water is", "choices": ["wet", "dry"], "gold": 0}
PIQA = {"goal": "boil", "sol1": "heat it", "sol2": "cool it"}
HELLASWAG = {"activity_label": "Rowing", "ctx": "A man rows. he", "label": 0, "endings": ["stops.", "sings."]}
FILES = {
    "arc_easy": ("arc/arc_easy_test.jsonl", ARC),
    "arc_challenge": ("arc/arc_challenge_test.jsonl", ARC),
    "boolq": ("boolq/dev.jsonl", BOOLQ),
    "winogrande": ("winogrande/dev.jsonl", WINOGRANDE),
    "openbookqa": ("openbookqa/test.jsonl", OBQA),
    "piqa": ("piqa/valid.jsonl", PIQA),
    "hellaswag": ("hellaswag/val.jsonl.xz", HELLASWAG),
}
HEADER = "question,choice0,choice1,choice2,choice3,answer\n"
ROW = "What?,a,b,c,d,2\n"


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(lzma.compress(content) if path.suffix == ".xz" and "tar" not in path.name else content)


def refused(task, folder):
    with pytest.raises(LarosaError) as error:
        read_task(task, folder)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("task", FILES)
def test_a_good_file_is_read(task, tmp_path):
    file, item = FILES[task]
    put(tmp_path / file, "\ufeff" + json.dumps(item) + "\r\n" + json.dumps(item))  # as saved on Windows
    put(tmp_path / "piqa" / "valid-labels.lst", "0\n1\n")
    ((_, splits),) = read_task(task, tmp_path).items()
    ((_, documents),) = splits.items()
    assert len(documents) == 2


@pytest.mark.parametrize("task", [*FILES, "mmlu"])
def test_a_missing_file_is_named(task, tmp_path):
    file = "mmlu/mmlu_test_dev.tar.xz" if task == "mmlu" else FILES[task][0]
    assert refused(task, tmp_path).startswith(f"{tmp_path / file} is missing; put the file there")
    assert "is not a folder" in refused(task, tmp_path / "nowhere")


@pytest.mark.parametrize("task", FILES)
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": "cut o', "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ("", "blank"),
        ("{}", "the keys here are: none"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(task, line, reason, tmp_path):
    file, item = FILES[task]
    line = line if isinstance(line, bytes) else line.encode()
    put(tmp_path / file, json.dumps(item).encode() + b"\n" + line + b"\n" + json.dumps(item).encode())
    put(tmp_path / "piqa" / "valid-labels.lst", "0\n1\n1\n")
    message = refused(task, tmp_path)
    assert message.startswith(f"{tmp_path / file}, line 2: ")
    assert reason in message


@pytest.mark.parametrize(
    ("task", "change", "reason"),
    [
        ("arc_easy", {"question": "  "}, "'question' must be a string that is not blank, not '  '"),
        ("arc_easy", {"choices": ["a"]}, "'choices' must be a list of two or more strings"),
        ("arc_easy", {"choices": ["a", 3]}, "'choices' must be a list of two or more strings"),
        ("arc_challenge", {"gold": 3}, "'gold' must be the index of the right answer, 0 to 2, not 3"),
        ("arc_challenge", {"gold": "B"}, "'gold' must be the index of the right answer, 0 to 2, not 'B'"),
        ("openbookqa", {"gold": True}, "'gold' must be the index"),
        ("openbookqa", {"question_stem": 5}, "'question_stem' must be a string, not 5"),
        ("boolq", {"answer": "yes"}, "'answer' must be one of True, False, not 'yes'"),
        ("boolq", {"answer": 1}, "'answer' must be one of True, False, not 1"),
        ("winogrande", {"sentence": "The cup fell."}, "'sentence' has no '_'"),
        ("winogrande", {"answer": 1}, "'answer' must be one of '1', '2', not 1"),
        ("piqa", {"sol2": None}, "'sol2' must be a string, not None"),
        ("hellaswag", {"label": -1}, "'label' must be the index of the right answer, 0 to 1, not -1"),
        ("hellaswag", {"ctx_b": "he"}, "no 'ctx_a'"),
        ("hellaswag", {"ctx_a": "A man rows.", "ctx_b": 1}, "'ctx_b' must be a string, not 1"),
        ("hellaswag", {"endings": "x" * 99}, f"not '{'x' * 56}..."),
    ],
)
def test_a_bad_value_is_named(task, change, reason, tmp_path):
    file, item = FILES[task]
    put(tmp_path / file, json.dumps(item) + "\n" + json.dumps({**item, **change}) + "\n")
    put(tmp_path / "piqa" / "valid-labels.lst", "0\n1\n")
    message = refused(task, tmp_path)
    assert message.startswith(f"{tmp_path / file}, line 2: ")
    assert reason in message


def test_an_empty_file_is_named(tmp_path):
    put(tmp_path / "boolq" / "dev.jsonl", "")
    assert refused("boolq", tmp_path) == f"{tmp_path / 'boolq' / 'dev.jsonl'}: empty; wanted one item a line"


def test_a_folder_in_a_files_place_is_named(tmp_path):
    (tmp_path / "boolq" / "dev.jsonl").mkdir(parents=True)
    assert "cannot be read (Is a directory)" in refused("boolq", tmp_path)


def test_piqa_labels_must_fit(tmp_path):
    put(tmp_path / "piqa" / "valid.jsonl", (json.dumps(PIQA) + "\n") * 2)
    labels = tmp_path / "piqa" / "valid-labels.lst"
    assert refused("piqa", tmp_path).startswith(f"{labels} is missing")
    put(labels, "0\n")
    assert "has 1 labels for the 2 items of" in refused("piqa", tmp_path)
    put(labels, "0\n2\n")
    assert refused("piqa", tmp_path) == f"{labels}, line 2: the label must be 0 or 1, not '2'"


def test_a_broken_compression_is_named(tmp_path):
    path = tmp_path / "hellaswag" / "val.jsonl.xz"
    put(path, json.dumps(HELLASWAG))
    for content in (path.read_bytes()[:-9], b"plain text"):
        path.write_bytes(content)
        assert refused("hellaswag", tmp_path).startswith(f"{path}: not a whole .xz file (")


def archive(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:xz") as tar:
        for name, content in files.items():
            content = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"README.md": "nothing here"}, ": no file test/SUBJECT_test.csv in it"),
        ({"test/anatomy_test.csv": HEADER + ROW}, ": no file dev/anatomy_dev.csv in it"),
        ({"test/anatomy_test.csv": HEADER + ROW, "dev/anatomy_dev.csv": HEADER + ROW}, "has 1 items; 5 go before"),
        ({"test/anatomy_test.csv": HEADER}, ": test/anatomy_test.csv: no items"),
        ({"test/anatomy_test.csv": HEADER + ROW + "What?,a,b,2\n"}, "line 3: 4 fields where the header names 6"),
        ({"test/anatomy_test.csv": HEADER + '"What\n?",a,b,c,"d,1\n'}, "line 3: not CSV ("),
        ({"test/anatomy_test.csv": HEADER.encode() + b"\xff\xff,a,b,c,d,2\n"}, "line 2: not UTF-8"),
        (
            {"test/anatomy_test.csv": HEADER + ROW + "What?,a,b,c,d,C\n", "dev/anatomy_dev.csv": HEADER + ROW * 5},
            "test/anatomy_test.csv, line 3: 'answer' must be one of '0', '1', '2', '3', not 'C'",
        ),
        (
            {"test/anatomy_test.csv": "question,answer\nWhat?,2\n", "dev/anatomy_dev.csv": HEADER + ROW * 5},
            "test/anatomy_test.csv, line 2: no 'choice0' (wanted: a string); the keys here are: question, answer",
        ),
    ],
)
def test_a_bad_archive_is_named(files, reason, tmp_path):
    path = tmp_path / "mmlu" / "mmlu_test_dev.tar.xz"
    archive(path, files)
    message = refused("mmlu", tmp_path)
    assert message.startswith(f"{path}: ")
    assert reason in message


def test_a_broken_archive_is_named(tmp_path):
    path = tmp_path / "mmlu" / "mmlu_test_dev.tar.xz"
    archive(path, {"test/anatomy_test.csv": HEADER + ROW})
    whole = path.read_bytes()
    for content in (whole[:-20], b"plain text"):
        path.write_bytes(content)
        assert refused("mmlu", tmp_path).startswith(f"{path}: not a whole .xz file (")
    path.write_bytes(lzma.compress(lzma.decompress(whole)[:530]))
    assert refused("mmlu", tmp_path).startswith(f"{path}: not a whole .tar.xz archive (")


@pytest.mark.parametrize(
    ("context", "parts"),
    [
        ("A man rows. he", ("A man rows.", "he")),
        ("A man rows. He waits! the other man", ("A man rows. He waits!", "the other man")),
        ('He says "stop." the dog', ('He says "stop."', "the dog")),
        ("How to row. Sit down.", ("How to row. Sit down.", "")),
        ("no sentence at all", ("no sentence at all", "")),
    ],
)
def test_a_context_is_split_after_its_last_sentence(context, parts):
    assert split_context(context) == parts
