"""Every experiment end to end on a tiny random model: quality is the bundled model's business, arithmetic is this."""

from __future__ import annotations

import csv
import gc
import json
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

import larosa
from larosa import version
from larosa.config import SITES, PerSite
from larosa.errors import LarosaError
from larosa.evaluation.perplexity import evaluate_windows
from larosa.evaluation.tasks import PAPER_TASKS, TaskResult, TaskResults
from larosa.reproduce import EXPERIMENTS, paper, reproduce
from larosa.reproduce import context as context_module
from larosa.reproduce import tasks as tasks_module
from larosa.reproduce.cache import Cache
from larosa.reproduce.calibration_sets import samples
from larosa.reproduce.context import Context, best_point
from larosa.reproduce.experiment import NOT_REACHABLE
from larosa.reproduce.variants import CATS, LAROSA, TEAL, TOPK, TOPK_GS
from larosa.sparsity import keep_counts, search


def rows(results, name=None):
    """A table as a list of dictionaries, by heading."""
    table = next(t for t in results.tables if name is None or t.name == name)
    return [dict(zip([c.name for c in table.columns], row, strict=True)) for row in table.rows]


def fake_tasks(model, tokenizer, tasks, *, data, limit, seed, batch_size):
    """An accuracy that depends on nothing but whether the model is converted."""
    scores = (1, 1, 0, 0) if getattr(model.config, "larosa", None) is None else (1, 0, 0, 0)
    value = sum(scores) / 4
    results = {
        name: TaskResult(name, "acc", 0, value, 0.1, 4, 10, chance=0.4, truncated_prompts=0, scores=scores)
        for name in tasks
    }
    return TaskResults(results, str(data), limit, batch_size, seed, "0")


@pytest.fixture
def counted(monkeypatch):
    """The evaluations that really run, in order."""
    calls = []

    def evaluate(*arguments, **options):
        calls.append(getattr(arguments[0].config, "larosa", None))
        return evaluate_windows(*arguments, **options)

    monkeypatch.setattr(context_module, "evaluate_windows", evaluate)
    return calls


@pytest.fixture
def few_points(monkeypatch):
    monkeypatch.setattr(context_module, "GRID", (0.9, 1.0))


def test_table2_rows_are_what_larosa_measures(shared_context, few_points, dense, settings):
    found = rows(EXPERIMENTS["table2"].run(shared_context))
    teal = next(row for row in found if (row["method"], row["sparsity"]) == ("TEAL", 0.4))
    model, tokenizer = larosa.load(str(dense), device="cpu")
    reference, _ = larosa.load(str(dense), device="cpu")
    options = {"calibration": settings().calibration, "num_sequences": 4, "sequence_length": 16}
    larosa.convert(model, tokenizer, method="teal", sparsity=0.4, **options)
    expected = larosa.evaluate(
        model, tokenizer, settings().data, sequence_length=16, max_sequences=2, reference=reference
    )
    assert teal["KL to dense (nats/token)"] == pytest.approx(expected.kl_divergence)
    assert teal["same top token"] == pytest.approx(expected.top1_agreement)
    assert teal["perplexity"] == pytest.approx(expected.perplexity)
    assert teal["weights skipped, measured"] == pytest.approx(expected.actual_sparsity.mean)


def test_table2_says_what_cats_cannot_reach(shared_context, few_points):
    found = {row["sparsity"]: row for row in rows(EXPERIMENTS["table2"].run(shared_context)) if row["method"] == "CATS"}
    assert isinstance(found[0.4]["KL to dense (nats/token)"], float)
    for sparsity in (0.5, 0.6):
        assert found[sparsity]["KL to dense (nats/token)"] == NOT_REACHABLE
        assert found[sparsity]["perplexity"] is None


def test_every_method_skips_the_same_fraction_of_weights(shared_context, few_points):
    for row in rows(EXPERIMENTS["table2"].run(shared_context)):
        exact = row["method"].startswith(("TopK", "LaRoSA"))
        if row["weights skipped, measured"] is not None:
            # k is a whole number of 32 entries; thresholds are calibrated on other text.
            assert row["weights skipped, measured"] == pytest.approx(row["sparsity"], abs=0.02 if exact else 0.06)


def test_divergence_and_perplexity_by_hand(shared_context):
    context = shared_context
    found = context.evaluate(TOPK, 0.5)
    model = context.sparsified(TOPK, 0.5)
    dense, _ = larosa.load(context.path, device="cpu")
    loss = divergence = agreement = 0.0
    with torch.inference_mode():
        for window in context.windows:
            p, q = (m(window[None]).logits[0, :-1].double().log_softmax(-1) for m in (dense, model))
            loss += float(F.nll_loss(q, window[1:], reduction="sum"))
            divergence += float((p.exp() * (p - q)).sum())
            agreement += float((p.argmax(-1) == q.argmax(-1)).sum())
    tokens = context.windows.numel() - len(context.windows)
    assert found["tokens"] == tokens
    assert found["kl"] == pytest.approx(divergence / tokens, rel=1e-4)
    assert found["perplexity"] == pytest.approx(torch.tensor(loss / tokens).exp().item(), rel=1e-4)
    assert found["top1"] == pytest.approx(agreement / tokens)


def test_changing_counts_is_the_same_as_converting_anew(shared_context):
    """One conversion serves all sparsities and coefficients: what comes out must not depend on that."""
    context, alphas = shared_context, PerSite(h1=0.9, h2=1.2, h3=1.1, h4=0.8)
    context.sparsified(LAROSA, 0.6, PerSite())
    reused = evaluate_windows(context.sparsified(LAROSA, 0.25, alphas), context.windows, None)
    model, tokenizer = larosa.load(context.path, device="cpu")
    larosa.convert(
        *(model, tokenizer),
        **{"sparsity": 0.25, "alphas": alphas, "rotation": "layer", "covariance": "h1"},
        **{"num_sequences": 4, "sequence_length": 16, "calibration": context.settings.calibration},
        **{"rotation_objective": "inputs", "value_rotation": False, "score": "magnitude"},
    )
    assert model.config.larosa["keep"]["h1"] == keep_counts(0.25, alphas, context.sizes).h1
    assert evaluate_windows(model, context.windows, None).perplexity == pytest.approx(reused.perplexity, rel=1e-6)


def test_table5_shows_that_counts_are_exact_and_thresholds_are_not(shared_context, few_points):
    found = {row["method"]: row for row in rows(EXPERIMENTS["table5"].run(shared_context))}
    spread = {name: [float(row[f"{site} (%)"].split("±")[1]) for site in SITES] for name, row in found.items()}
    assert all(value == 0 for name in ("TopK", "TopK+GS", "LaRoSA") for value in spread[name])
    assert all(value > 0 for value in spread["TEAL"])
    assert found["TopK"]["h1 (%)"] == "50.0 ± 0.0"


def test_table6_has_every_level_and_its_adapters(shared_context, few_points):
    found = rows(EXPERIMENTS["table6"].run(shared_context))
    adapters = {row["rotation"]: row["adapters"] for row in found}
    assert adapters == {"none": 0, "random": 0, "model": 0, "layer": 2, "layer, PCA of h1 and h3": 2, "block": 5}
    assert all(row["of dense"] > 1 for row in found if row["adapters"])


def test_calibration_sets_are_compared_with_the_first(dense, settings, texts, tmp_path, few_points):
    context = Context(str(dense), settings(other_calibration=(str(texts["other"]),)), tmp_path)
    similar = {row["calibrated on"]: row for row in rows(EXPERIMENTS["table8"].run(context))}
    labels = list(similar)
    assert re.fullmatch(r"texts\d*/calibration.txt", labels[0])
    assert [label.rpartition("/")[2] for label in labels[1:]] == [
        "calibration.txt, another sample",
        "other.txt",
        "self",
        "no direction preferred",
    ]
    first, others = similar[labels[0]], [similar[label] for label in labels[1:]]
    assert first["h1"] == pytest.approx(1)
    assert all(0 < row["h1"] < 1 for row in others)
    quality = rows(EXPERIMENTS["table7"].run(context))
    assert [row["calibrated on"] for row in quality] == ["dense", *(label for label in labels[:-1] for _ in range(3))]
    assert len({row["perplexity"] for row in quality}) == len(quality)  # each sample gives a model of its own


def test_calibration_sets_of_the_same_name_are_told_apart(dense, settings, texts, tmp_path):
    same = tmp_path / texts["calibration"].parent.name / "calibration.txt"
    same.parent.mkdir()
    same.write_text(texts["other"].read_text("utf-8"), "utf-8")
    others = (str(same), settings().calibration)  # the run's own again is no other
    found = samples(Context(str(dense), settings(other_calibration=others), tmp_path / "cache"))
    assert [source for source, _ in found.values()] == [settings().calibration] * 2 + [str(same), "self"]
    assert str(same) in found


def test_table10_finds_the_lowest_points_of_the_grid(shared_context, few_points):
    results = EXPERIMENTS["table10"].run(shared_context)
    grid = [row for row in rows(results, "table10-grid") if row["method"] == "TopK+GS"]
    assert len(grid) == 4
    chosen = {row["chosen by"]: row for row in rows(results, "table10") if row["method"] == "TopK+GS"}
    for by, key in (("lowest perplexity", "perplexity"), ("lowest KL", "KL to dense (nats/token)")):
        best = min(grid, key=lambda row: row[key])
        assert [chosen[by][f"alpha {site}"] for site in SITES] == [best[f"alpha {site}"] for site in SITES]
    assert [chosen["all 1"][f"alpha {site}"] for site in SITES] == [1, 1, 1, 1]


@pytest.mark.parametrize("grid", [(0.8, 0.95, 1.1), pytest.param(search.GRID, marks=pytest.mark.slow)], ids=len)
def test_searched_coefficients_are_those_of_algorithm_1(shared_context, dense, settings, monkeypatch, grid):
    """The same point as `larosa convert --search grid`, which scores on all calibration sequences."""
    monkeypatch.setattr(search, "GRID", grid)
    monkeypatch.setattr(context_module, "GRID", grid)
    context = Context(str(dense), settings(search_sequences=4), shared_context._cache._folder)
    model, tokenizer = larosa.load(str(dense), device="cpu")
    larosa.convert(
        *(model, tokenizer),
        **{"method": "topk", "search": "grid", "calibration": settings().calibration},
        **{"num_sequences": 4, "sequence_length": 16, "sparsity": 0.5},
    )
    points = context.grid(TOPK_GS)
    assert best_point(points, "perplexity")[0].model_dump() == pytest.approx(model.config.larosa["alphas"])


@pytest.mark.parametrize("name", ["figure1", "figure3", "figure5", "gaussianity", "table19"])
def test_figures_and_what_needs_no_quality(shared_context, name):
    results = EXPERIMENTS[name].run(shared_context)
    assert results.tables
    assert all(picture.png.startswith(b"\x89PNG") for picture in results.pictures)
    assert bool(results.pictures) == (name != "table19")


def test_figure3_counts_what_teal_drops(shared_context):
    found = {row["method"]: row for row in rows(EXPERIMENTS["figure3"].run(shared_context), "figure3-sparsity")}
    assert found["TopK"]["deviation over tokens"] == 0
    assert found["TEAL"]["deviation over tokens"] > 0.01
    assert found["TEAL"]["lowest sequence"] < found["TEAL"]["mean"] < found["TEAL"]["highest sequence"]


def test_figure5_errors_grow_and_rotation_leaves_h2_and_h4_alone(shared_context):
    found = rows(EXPERIMENTS["figure5"].run(shared_context))
    for site in SITES:
        curve = [row for row in found if row["site"] == site]
        for method in ("TEAL", "TopK", "LaRoSA"):
            values = [row[method] for row in curve]
            assert values == sorted(values)
        if site in ("h2", "h4"):
            assert [row["LaRoSA"] for row in curve] == pytest.approx([row["TopK"] for row in curve], rel=1e-3)


def test_table1_measures_each_method_once(dense, settings, tmp_path, monkeypatch, few_points):
    calls = []

    def fake(model, tokenizer, tasks, **options):
        calls.append((*tasks, options["limit"]))
        return fake_tasks(model, tokenizer, tasks, **options)

    monkeypatch.setattr(tasks_module, "evaluate_tasks", fake)
    monkeypatch.setattr(tasks_module, "read_task", lambda task, folder: None)
    (tmp_path / "tasks").mkdir()
    context = Context(str(dense), settings(task_data=tmp_path / "tasks", limit=5), tmp_path / "cache")
    found = rows(EXPERIMENTS["table1"].run(context))
    assert [(row["method"], row["sparsity"]) for row in found[:3]] == [("dense", 0.0), ("CATS", 0.25), ("TEAL", 0.25)]
    assert found[0]["mean of seven"] == 0.5
    assert found[1]["mean of seven"] == 0.25
    assert found[-1]["mean of seven"] == pytest.approx(0.4)
    unreachable = [row for row in found if row["mean of seven"] == NOT_REACHABLE]
    assert [(row["method"], row["sparsity"]) for row in unreachable] == [("CATS", 0.5)]
    assert {("piqa", 5), ("mmlu", 1)} < set(calls[: len(PAPER_TASKS)])
    before = len(calls)
    assert rows(EXPERIMENTS["table1"].run(context)) == found
    assert len(calls) == before


def test_accuracies_have_errors(dense, settings, tmp_path, monkeypatch, few_points):
    monkeypatch.setattr(tasks_module, "evaluate_tasks", fake_tasks)
    context = Context(str(dense), settings(), tmp_path / "cache")
    found = rows(EXPERIMENTS["accuracy"].run(context))
    points = [(name, sparsity) for name in ("TopK", "TEAL", "paper", "best") for sparsity in (0.25, 0.4, 0.5)]
    assert [(row["method"], row["sparsity"]) for row in found] == [("dense", 0.0), *points, ("chance", None)]
    assert (found[0]["mean of seven"], found[0]["±"]) == (0.5, pytest.approx(0.1 / 7**0.5))
    assert found[0]["less dense"] is None
    for row in found[1:-1]:
        assert (row["mean of seven"], row["less dense"]) == (0.25, -0.25)
        # Of four items one differs: a variance of 1/4 in each of seven tasks.
        assert row["± less dense"] == pytest.approx((0.25 / 4 / 7) ** 0.5)
        assert (row["piqa (acc)"], row["± piqa"]) == (0.25, 0.1)
    assert found[-1]["mean of seven"] == pytest.approx(0.4)


def test_a_broken_task_file_stops_before_anything_is_scored(dense, settings, tmp_path, monkeypatch, counted):
    (tmp_path / "tasks" / "winogrande").mkdir(parents=True)
    item = {"sentence": "The _ is here.", "option1": "cat", "option2": "dog", "answer": "1"}
    (tmp_path / "tasks" / "winogrande" / "dev.jsonl").write_text(json.dumps(item), "utf-8")
    monkeypatch.setattr(tasks_module, "evaluate_tasks", lambda *_, **__: pytest.fail("scored"))
    context = Context(str(dense), settings(task_data=tmp_path / "tasks"), tmp_path / "cache")
    with pytest.raises(LarosaError, match=r"valid\.jsonl is missing"):
        EXPERIMENTS["accuracy"].run(context)


@pytest.mark.slow
def test_everything_in_one_page(dense, settings, tmp_path, few_points, counted):
    folder = tmp_path / "out"
    result = reproduce("all", str(dense), folder, settings())
    page = (folder / "index.html").read_text("utf-8")
    assert [section.name for section in result.sections] == list(EXPERIMENTS)
    without = [section.name for section in result.sections if section.missing]
    assert without == ["table1", "table4", "accuracy"]  # no task data
    for name in EXPERIMENTS:
        assert f'<section id="{name}">' in page
        assert f'<a href="#{name}">' in page
    assert "needs --task-data" in page
    assert "not reachable" in page
    assert not re.search(r'(src|href)="(?!data:image/png;base64,|#)', page)  # opens from disk, alone
    assert (folder / "table2.csv").is_file()
    content = json.loads((folder / "table2.json").read_text("utf-8"))
    assert content["settings"]["sequence_length"] == 16
    with (folder / "table2.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert float(table[1]["perplexity"]) == content["tables"][0]["rows"][1][4]
    text = (folder / "table2.md").read_text("utf-8")
    assert "not reachable" in text
    assert f"- data: `{settings().data}`" in text

    # A second run measures nothing and says the same.
    measured = {file: file.stat().st_mtime_ns for file in (folder / ".cache").iterdir()}
    counted.clear()
    again = reproduce("all", str(dense), folder, settings())
    assert counted == []
    assert {file: file.stat().st_mtime_ns for file in (folder / ".cache").iterdir()} == measured
    assert again.to_dict() == result.to_dict()
    assert (folder / "index.html").read_text("utf-8") == page

    # A changed setting is measured anew, and what was measured before stays.
    changed = reproduce("table2", str(dense), folder, settings(max_sequences=1))
    assert counted != []
    assert changed.sections[0].results.tables[0].rows != result.sections[0].results.tables[0].rows
    after = {file: file.stat().st_mtime_ns for file in (folder / ".cache").iterdir()}
    assert measured.items() < after.items()


def test_a_killed_run_goes_on_where_it_stopped(dense, settings, tmp_path, few_points, counted, monkeypatch):
    whole = reproduce("table2", str(dense), tmp_path / "whole", settings())
    total = len(counted)
    counted.clear()

    def killed(*arguments, **options):
        if len(counted) == 7:
            raise KeyboardInterrupt
        return evaluate(*arguments, **options)

    evaluate = context_module.evaluate_windows
    with monkeypatch.context() as patch:
        patch.setattr(context_module, "evaluate_windows", killed)
        with pytest.raises(KeyboardInterrupt):
            reproduce("table2", str(dense), tmp_path / "out", settings())
    assert len(counted) == 7
    counted.clear()
    rest = reproduce("table2", str(dense), tmp_path / "out", settings())
    assert len(counted) == total - 7
    assert [t.to_dict() for t in rest.sections[0].results.tables] == [
        t.to_dict() for t in whole.sections[0].results.tables
    ]


def test_another_model_or_text_under_the_same_name_is_measured_anew(
    dense, settings, tmp_path, make_model, tokenizer, words, counted
):
    text, model = tmp_path / "text.txt", tmp_path / "model"
    text.write_text(words(64, 7), "utf-8")
    make_model("llama").save_pretrained(model)
    tokenizer.save_pretrained(model)

    def measure():
        context = Context(str(model), settings(data=str(text)), tmp_path / "cache")
        return context.evaluate(TOPK, 0.5)["perplexity"]

    first = measure()
    assert measure() == first
    assert len(counted) == 1
    text.write_text(words(64, 8), "utf-8")
    second = measure()
    make_model("llama", seed=1).save_pretrained(model)
    third = measure()
    assert len({first, second, third}) == len(counted) == 3


def test_a_damaged_measurement_is_made_again(tmp_path):
    cache = Cache(tmp_path, "model")
    assert cache.get("kind", {"a": 1}, lambda: {"x": 1}) == {"x": 1}
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text("utf-8")[:-20], "utf-8")
    assert cache.get("kind", {"a": 1}, lambda: {"x": 2}) == {"x": 2}
    assert cache.get("kind", {"a": 1}, lambda: {"x": 3}) == {"x": 2}
    assert cache.get("kind", {"a": 2}, lambda: {"x": 4}) == {"x": 4}


def test_a_measurement_by_another_source_is_not_used(tmp_path, monkeypatch):
    assert Cache(tmp_path, "model").get("kind", {}, lambda: {"x": 1}) == {"x": 1}
    copy = tmp_path / "larosa"
    shutil.copytree(Path(version.__file__).parent, copy, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    monkeypatch.setattr(version, "__file__", str(copy / "version.py"))
    digest = version.source_digest.__wrapped__()
    assert digest == version.source_digest()
    for changed in ("ops/cuda/source/linear.cu", "sparsity/sites.py"):
        (copy / changed).write_bytes((copy / changed).read_bytes() + b"\n")
        assert version.source_digest.__wrapped__() != digest
        digest = version.source_digest.__wrapped__()
    monkeypatch.setattr("larosa.reproduce.cache.source_digest", version.source_digest.__wrapped__)
    assert Cache(tmp_path, "model").get("kind", {}, lambda: {"x": 2}) == {"x": 2}


def test_releasing_lets_go_of_both_models_and_references_go_on(dense, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(context_module, "_RECORDED_BYTES", 0)  # the dense model stays beside the other
    context = Context(str(dense), settings(), tmp_path)
    reference = context.reference(context.windows)
    logits = reference(context.windows)
    context.sparsified(CATS, 0.25)
    models = [weakref.ref(model) for model in (context._resident, context._held[1])]
    context.release()
    gc.collect()
    assert [model() for model in models] == [None, None]
    assert torch.equal(reference(context.windows), logits)


def test_recorded_and_live_references_agree(dense, settings, tmp_path, monkeypatch):
    recorded = Context(str(dense), settings(), tmp_path / "a").evaluate(CATS, 0.25)
    monkeypatch.setattr(context_module, "_RECORDED_BYTES", 0)
    live = Context(str(dense), settings(), tmp_path / "b").evaluate(CATS, 0.25)
    assert live["kl"] == pytest.approx(recorded["kl"])


def test_nan_in_the_model_is_an_error_and_nothing_is_kept(dense, settings, tmp_path, monkeypatch):
    context = Context(str(dense), settings(), tmp_path)
    monkeypatch.setattr(
        context_module, "evaluate_windows", lambda *_, **__: (_ for _ in ()).throw(LarosaError("the logits are NaN"))
    )
    with pytest.raises(LarosaError, match="NaN"):
        context.evaluate(TEAL, 0.5)
    assert [file for file in tmp_path.iterdir() if file.name.startswith("evaluation")] == []


@pytest.mark.parametrize(
    ("theirs", "name", "column", "expected"),
    [
        ("LLaMA3-8B", "table2", "perplexity, paper", 7.22),
        ("LLaMA3-8B", "table6", "TFLOPs, paper", 34.91),
        ("LLaMA3-8B", "table7", "perplexity", 7.23),
        ("LLaMA3-8B", "table10", "perplexity", 8.86),
        ("LLaMA2-7B", "table5", "perplexity", 6.02),
        ("Qwen2.5-7B", "table8", "cosine similarity", 0.998),
        ("LLaMA3-8B", "table1", "MMLU, paper", 58.65),
        ("LLaMA3-8B", "table3", "tokens/s, paper, A100", 131.62),
    ],
)
@pytest.mark.one_of(4)
def test_the_papers_numbers_stand_beside_ours(
    dense, settings, tmp_path, monkeypatch, few_points, theirs, name, column, expected
):
    monkeypatch.setattr(tasks_module, "evaluate_tasks", fake_tasks)
    monkeypatch.setattr(tasks_module, "read_task", lambda task, folder: None)
    (tmp_path / "tasks").mkdir()
    context = Context(str(dense), settings(task_data=tmp_path / "tasks"), tmp_path / "cache")
    assert context.paper is None
    context.paper = next(model for model in paper.MODELS if model.name == theirs)
    results = EXPERIMENTS[name].run(context)
    tables = [[c.name for c in table.columns] for table in results.tables]
    shown = [
        row[columns.index(column)]
        for table, columns in zip(results.tables, tables, strict=True)
        if column in columns
        for row in table.rows
    ]
    assert expected in shown
    assert all(table.markdown() and table.html() for table in results.tables)
    if name not in ("table3", "table8", "table10"):
        assert any("budget" in note for note in results.notes)


def test_recipe_adds_part_by_part_at_equal_sparsity(shared_context, few_points, monkeypatch):
    monkeypatch.setattr("larosa.reproduce.recipe.SPARSITIES", (0.5,))
    found = rows(EXPERIMENTS["recipe"].run(shared_context))
    assert len(found) == 1 + 2 * 11
    for first in range(1, len(found), 11):
        group = found[first : first + 11]
        assert [row["parts"][0] for row in group] == [*"t ++++ +++ "]
        assert len({row["sparsity"] for row in group}) == 1
        assert float(group[0]["KL, of the paper's"]) == 1
        assert len({row["KL to dense (nats/token)"] for row in group[2:]}) == 9
