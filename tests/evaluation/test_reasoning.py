"""Problems answered in a model's own words: reading, sampling and scoring."""

from __future__ import annotations

import csv
import json

import pytest
from lm_eval.tasks.aime.utils import process_results

from larosa import LarosaError, generate
from larosa.evaluation.reasoning import Problem, complete, read_problems, score
from larosa.evaluation.reasoning import completions as completions_module
from larosa.evaluation.reasoning.accuracy import is_right
from larosa.evaluation.reasoning.completions import TEMPERATURE, TOP_P

LAST_LINE = "Therefore, the final answer is: $\\boxed{%s}$. I hope it is correct"


def write(folder, name, lines):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


class TestProblems:
    def test_math_problems_and_their_answers(self, tmp_path):
        write(tmp_path, "math500/test.jsonl", [{"problem": "1 + {1}?", "answer": "2", "solution": "…"}])
        write(tmp_path, "gsm8k/test.jsonl", [{"question": "How many?", "answer": "Many.\n#### 1,024"}])
        (found,) = read_problems("math500", tmp_path)
        assert found.prompt.endswith("Think step by step before answering.\n\n1 + {1}?")
        assert "'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct'" in found.prompt
        assert (found.answer, found.is_choice) == ("2", False)
        assert read_problems("gsm8k", tmp_path)[0].answer == "1024"

    def test_choices_in_an_order_that_says_nothing(self, tmp_path):
        (tmp_path / "gpqa").mkdir()
        keys = ["Question", "Correct Answer", *(f"Incorrect Answer {index}" for index in (1, 2, 3))]
        with (tmp_path / "gpqa" / "gpqa_diamond.csv").open("w", newline="") as file:
            csv.writer(file).writerows([keys, *[["Which?\n", "right", "wrong", "false", "bad"]] * 40])
        problems = read_problems("gpqa_diamond", tmp_path)
        for problem in problems:
            assert f"\n{problem.answer}) right" in problem.prompt
            assert sorted(line[3:] for line in problem.prompt.split("\n")[-4:]) == ["bad", "false", "right", "wrong"]
        assert {problem.answer for problem in problems} == set("ABCD")
        assert problems == read_problems("gpqa_diamond", tmp_path)

    @pytest.mark.parametrize(
        ("name", "line", "message"),
        [
            ("gsm8k", {"question": "How many?", "answer": "5"}, "line 1: 'answer' has no '####'"),
            ("math500", {"problem": "1 + 1?"}, "line 1: no 'answer'"),
            ("aime24", {"problem": " ", "answer": "2"}, "'problem' must be a string that is not blank"),
        ],
    )
    def test_malformed_files(self, tmp_path, name, line, message):
        write(tmp_path, f"{name}/test.jsonl", [line])
        with pytest.raises(LarosaError, match=message):
            read_problems(name, tmp_path)
        with pytest.raises(LarosaError, match="unknown problem set 'math'"):
            read_problems("math", tmp_path)


class TestScoring:
    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            ("204", "204"),
            ("\\frac{3}{4}", "\\frac{3}{4}"),
            ("\\frac{3}{4}", "\\dfrac34"),
            ("3", "4"),
            ("x^2+1", "x^2 + 1"),
            ("10", "1,0"),
            ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ],
    )
    def test_agrees_with_lm_eval_on_the_same_answers(self, answer, said):
        text = "First 7, then 9.\n" + LAST_LINE % said
        theirs = process_results({"answer": answer}, [text])["exact_match"]
        assert is_right(Problem("0", "", answer), text) == bool(theirs)

    def test_equal_in_value_is_right(self):
        assert is_right(Problem("0", "", "\\frac{1}{2}"), LAST_LINE % "0.5")
        assert not is_right(Problem("0", "", "\\frac{1}{2}"), LAST_LINE % "0.6")
        assert not is_right(Problem("0", "", "5"), "")

    @pytest.mark.parametrize(
        ("text", "letter"),
        [
            ("Answer: B", "B"),
            ("**Answer:** $B$", "B"),
            ("Answer: C? No. Answer: $\\boxed{B}$", "B"),
            ("Answer: (b).", "B"),
            ("B", None),
            ("Answer: Because of that", None),
            ("", None),
        ],
    )
    def test_letters(self, text, letter):
        right = [answer for answer in "ABCD" if is_right(Problem("0", "", answer, is_choice=True), text)]
        assert right == ([] if letter is None else [letter])

    def test_pass_at_1_is_the_mean_over_samples_and_its_error_that_over_problems(self):
        problems = [Problem("a", "", "1"), Problem("b", "", "2")]
        said = {("a", 0): "1", ("a", 1): "1", ("b", 0): "2", ("b", 1): "3"}
        found = [
            completions_module.Completion(problem, sample, LAST_LINE % text, 5, finished=sample == 0)
            for (problem, sample), text in said.items()
        ]
        result = score(problems, found)
        assert (result.pass_at_1, result.scores) == (0.75, [1.0, 0.5])
        assert result.stderr == pytest.approx(0.25)
        assert (result.problems, result.samples, result.cut_off) == (2, 2, 0.5)

    def test_an_answer_that_cannot_be_read(self):
        with pytest.raises(LarosaError, match="problem 7: math-verify reads no answer from ''"):
            is_right(Problem("7", "", ""), "5")


class TestCompletions:
    PROBLEMS = (Problem("a", "w9 w10 w11", "1"), Problem("b", "w12", "2"), Problem("c", "w13 w14", "3"))

    @pytest.fixture
    def model(self, make_model):
        return make_model("llama", max_position_embeddings=64)

    def draw(self, model, tokenizer, log, **options):
        return complete(model, tokenizer, self.PROBLEMS, log, samples=2, max_new_tokens=9, **options)

    def test_each_is_what_generate_draws_with_its_seed(self, model, tokenizer, tmp_path):
        found = self.draw(model, tokenizer, tmp_path / "new" / "log.jsonl", max_sequences=4)
        wanted = [(problem, sample) for problem in self.PROBLEMS for sample in range(2)]
        for (problem, sample), completion in zip(wanted, found, strict=True):
            assert (completion.problem, completion.sample) == (problem.id, sample)
            alone = generate(
                model,
                tokenizer,
                problem.prompt,
                max_new_tokens=9,
                temperature=TEMPERATURE,
                top_k=0,
                top_p=TOP_P,
                seed=completions_module._seed(0, problem, sample),
            )
            assert completion.text == alone.text
            assert completion.finished == (alone.finish_reason == "stop")
        assert len({completion.text for completion in found}) == len(found)

    def test_a_stopped_run_goes_on(self, model, tokenizer, tmp_path, monkeypatch):
        log = tmp_path / "log.jsonl"
        whole = self.draw(model, tokenizer, log)
        lines = log.read_text("utf-8").splitlines(keepends=True)
        log.write_text("".join(lines[:2]) + lines[2][:20], "utf-8")
        assert self.draw(model, tokenizer, log, max_sequences=1) == whole
        assert sorted(log.read_text("utf-8").splitlines()) == sorted(line.strip() for line in lines)
        monkeypatch.setattr(completions_module, "_draw", None)  # nothing is left to draw
        assert self.draw(model, tokenizer, log) == whole

    def test_no_room_for_an_answer(self, model, tokenizer, tmp_path):
        long = [Problem("a", " ".join(["w9"] * 64), "1")]
        with pytest.raises(LarosaError, match="64 tokens leaves no room for an answer in a context of 64"):
            complete(model, tokenizer, long, tmp_path / "log.jsonl", samples=1, max_new_tokens=9)
