"""The score command: votes over samples from anywhere, worked by hand, and four models' stored verdicts reproduced."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from prompts.intervals import wilson
from stages.evals import commands
from stages.evals.recorded import Rules, score
from stages.evals.statistics import paired_wilson

ROOT = Path(__file__).resolve().parents[1]
SOLUTIONS = ROOT.parent / "shared" / "data" / "gsm8k" / "example_model_solutions.jsonl"
SAMPLES = [
    # three spellings of one number beat two abstentions and another number
    {"id": "a", "gold": "18", "samples": ["The answer is 18.", "[invalid]", "so #### 18.0", "no idea", "The answer is 7.", "$18"]},
    {"id": "b", "gold": "x = 2\n#### 2", "samples": ["The answer is 3.", "The answer is 2."]},  # a tie: the first seen, 3, is wrong
    {"id": "c", "gold": 5, "samples": ["I do not know.", "42 or so"]},  # nothing to vote for: wrong
    {"id": "d", "gold": "B", "samples": [{"text": "The answer is (A).", "answer": "B", "tokens": 5}]},  # a given answer counts
    {"id": "e", "gold": "1", "samples": []}]


def write(tmp_path, rows, name="samples.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def says(answers, tokens=10, **more):
    """Samples that state these answers; None states none."""
    return [{"text": "Hm." if a is None else f"The answer is {a}.", "tokens": tokens, **more} for a in answers]


def test_score_by_hand(tmp_path):
    result = score(write(tmp_path, SAMPLES))
    assert result["items"] == [{"id": i, "answer": a, "correct": c, "samples_used": n} for i, a, c, n in [
        ("a", "18", True, 6), ("b", "3", False, 2), ("c", None, False, 2), ("d", "B", True, 1), ("e", None, False, 0)]]
    assert (result["accuracy"], result["n"], tuple(result["wilson95"])) == (0.4, 5, wilson(2, 5))
    assert (result["unparsed"], result["unanswered"], result["ties"]) == (4, 2, 1)
    assert result["samples_used_mean"] == 11 / 5 and result["tokens_mean"] is None and result["lenient"] is None


def test_tokens_are_per_question(tmp_path):
    rows = [{"id": i, "gold": "1", "samples": [{"text": "The answer is 1.", "tokens": t} for t in tokens]}
            for i, tokens in enumerate([[4, 6], [5, 7], [[1, 2, 3]]])]
    assert score(write(tmp_path, rows))["tokens_mean"] == 25 / 3


def test_strict_abstains_where_lenient_takes_the_last_thing_of_the_type(tmp_path):
    rows = [{"id": 1, "gold": "7", "samples": ["3 and 4 make 7"]}, {"id": 2, "gold": "7", "samples": ["The answer is 7. Not 8."]},
            {"id": 3, "gold": "7", "samples": ["7, or rather 6"]}, {"id": 4, "gold": "7", "samples": ["The answer is seven."]},
            {"id": 5, "gold": "7", "samples": [{"text": "so 7", "answer": "[invalid]"}]}]  # given: the text is not read
    result = score(write(tmp_path, rows), Rules(answer_type="number"))
    assert result["strict"] == {"accuracy": 0.2, "n": 5, "wilson95": list(wilson(1, 5)), "unparsed": 4}
    assert result["lenient"] == {"accuracy": 0.4, "n": 5, "wilson95": list(wilson(2, 5)), "unparsed": 2}
    assert result["accuracy"] == 0.2 and result["unparsed"] == 4


def test_stopping_replays_in_drawing_order(tmp_path):
    rows = [{"id": "four alike", "gold": "1", "samples": says([1, 1, 1, 1, 2, 2, 2, 2, 2])},  # the whole vote goes to 2
            {"id": "late", "gold": "1", "samples": says([2, None, 1, 1, 1, 1, 1, 1, 3])}]
    path = write(tmp_path, rows)

    def used(stop, **rules):
        result = score(path, Rules(stop=stop, **rules))
        assert result["tokens_mean"] == 10 * result["samples_used_mean"]
        return [item["samples_used"] for item in result["items"]], [item["answer"] for item in result["items"]]

    assert used("none") == ([9, 9], ["2", "1"])
    # P(Beta(5, 1) > 1/2) = 1 - 1/32; of the second question 6 against 1 is the first lead above .95: 1 - 9/256, and 5 against 1: 1 - 8/128
    assert used("beta:0.95") == ([4, 8], ["1", "1"])
    assert used("window:3") == ([3, 6], ["1", "1"])
    assert used("binomial:0.05") == ([9, 9], ["2", "1"])  # 7 alike in a row would do, 6 against 1 does not (p .125)
    assert used("beta:0.95", samples=6) == ([4, 6], ["1", "1"])
    assert score(path, Rules(stop="beta:0.95", samples=2))["unparsed"] == 1


def test_first_sample_and_first_answer(tmp_path):
    path = write(tmp_path, [{"id": 1, "gold": "2", "samples": ["The answer is 2. The answer is 3.", "The answer is 3."]},
                            {"id": 2, "gold": "2", "samples": ["Hm.", "The answer is 2."]}])
    answers = {(which, vote): [item["answer"] for item in score(path, Rules(extract=which, vote=vote))["items"]]
               for which in ("first", "last") for vote in ("first", "majority")}
    assert answers == {("first", "first"): ["2", None], ("last", "first"): ["3", None], ("first", "majority"): ["2", "2"],
                       ("last", "majority"): ["3", "2"]}
    assert score(path, Rules(vote="first"))["samples_used_mean"] == 1


def test_weighted_vote(tmp_path):
    rows = [{"id": 1, "gold": "2", "samples": [*says([1, 1], weight=0.25), *says([2], weight=1)]}]
    assert [score(write(tmp_path, rows), Rules(vote=vote))["items"][0]["answer"] for vote in ("majority", "weighted")] == ["1", "2"]


def test_comparison_by_hand(tmp_path):
    def rows(right, ids, gold="1"):
        return [{"id": i, "gold": gold, "samples": says([1 if i in right else 2])} for i in ids]

    first, second = write(tmp_path, rows({0, 1, 2, 3, 4, 5}, range(8))), write(tmp_path, rows({5}, range(10)), "b.jsonl")
    pair = score(first, other=second)["compare"]
    assert (pair["n"], pair["only_in_first_file"], pair["only_in_second_file"]) == (8, 0, 2)
    assert pair["accuracy"] == [6 / 8, 1 / 8] and pair["difference"] == 5 / 8
    assert pair["mcnemar"] == {"both": 1, "only_first": 5, "only_second": 0, "neither": 2, "p": pytest.approx(2 / 32)}
    low, high = pair["bootstrap95"]
    assert low == pytest.approx(5 / 8 - 1.96 * (5 / 8 * 3 / 8 / 8) ** 0.5, abs=0.13) and 5 / 8 < high <= 1
    assert pair["ci95"] == list(paired_wilson(1, 5, 0, 2))
    low, high = score(first, other=first)["compare"]["ci95"]
    assert low < -0.1 and high > 0.1  # eight questions without a difference do not show that there is none
    with pytest.raises(ValueError, match=r"no id in common"):
        score(first, other=write(tmp_path, rows({}, range(20, 22)), "c.jsonl"))
    with pytest.raises(ValueError, match=r"id 0 has the gold answer '1' in .*'2' in"):
        score(first, other=write(tmp_path, rows({}, range(2), gold="2"), "d.jsonl"))


@pytest.mark.parametrize("rows, rules, message", [
    ([{"id": "a", "gold": "1"}], {}, r"jsonl, line 1: no 'samples'"), ([SAMPLES[0], SAMPLES[0]], {}, r"line 2: id 'a' was there before"),
    ([{"id": "a", "gold": "1", "samples": [3]}], {}, r"line 1, sample 1: expected a text"), ([], {}, "holds no samples"),
    ([{"id": "a", "gold": None, "samples": []}], {}, r"line 1: no 'gold'"),
    ([{"id": "a", "gold": "1", "samples": "x"}], {}, r"line 1: expected a list of samples, got str"),
    ([SAMPLES[0], SAMPLES[3]], {"answer_type": "number"}, r"line 2: the gold answer 'B' is not of the type number"),
    ([{"id": "a", "gold": " ", "samples": []}], {}, r"line 1: the gold answer ' ' is not"),
    ([SAMPLES[0], SAMPLES[1]], {"samples": 7}, r"no question has 7 samples: set --samples to at most 6"),
    ([{"id": 1, "gold": "1", "samples": says([1], tokens=-1)}], {}, r"line 1, sample 1: expected tokens to be a count"),
    ([{"id": 1, "gold": "1", "samples": says([1], weight=-2)}], {"vote": "weighted"}, r"sample 1: a weighted vote needs .* got -2"),
    ([{"id": 1, "gold": "1", "samples": says([1])}], {"vote": "weighted"}, r"sample 1: .* for each sample, and this one has none")])
def test_bad_samples(tmp_path, rows, rules, message):
    with pytest.raises(ValueError, match=message):
        score(write(tmp_path, rows), Rules(**rules))


@pytest.mark.parametrize("rules, message", [
    ({"answer_type": "integer"}, "unknown answer type 'integer': expected one of number"), ({"extract": "best"}, "expected last or first"),
    ({"vote": "all"}, "unknown vote 'all'"), ({"samples": 0}, "at least 1"), ({"stop": "beta"}, "unknown stopping rule 'beta'"),
    ({"stop": "beta:0.95", "vote": "first"}, "nothing to stop")])
def test_bad_rules(rules, message):
    with pytest.raises(ValueError, match=message):
        Rules(**rules)


def test_questions_with_fewer_samples_are_counted(tmp_path):
    result = score(write(tmp_path, SAMPLES), Rules(samples=2))
    assert result["fewer_samples"] == 2 and [item["samples_used"] for item in result["items"]] == [2, 2, 2, 1, 0]


def test_command(tmp_path, capsys):
    path, other = write(tmp_path, SAMPLES[:3]), write(tmp_path, SAMPLES[:2], "other.jsonl")
    out = tmp_path / "new" / "result.json"
    commands.score([str(path), "--answer-type", "number", "--samples", "6", "--stop", "beta:0.95", "--compare", str(other),
                    "--out", str(out)])
    expected = score(path, Rules(answer_type="number", samples=6, stop="beta:0.95"), other=other)
    assert json.loads(out.read_text()) == json.loads(json.dumps(expected))
    said = capsys.readouterr().out
    assert "unparsed 4, unanswered 1, ties 1" in said and "lenient accuracy 0.3333" in said
    assert "2 questions have fewer than 6 samples" in said and "1 questions are in one" in said
    path.write_text("{}\nx\n")
    done = subprocess.run([sys.executable, "-m", "stages.evaluation", "score", str(path), "--out", str(out)], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "samples.jsonl, line 1" in done.stderr


def test_the_command_looks_at_its_files_before_it_works(tmp_path):
    path = write(tmp_path, SAMPLES)
    for arguments, message in [([tmp_path / "no.jsonl", "--out", tmp_path / "r.json"], "no.jsonl does not exist"),
                               ([tmp_path, "--out", tmp_path / "r.json"], "is a folder: give a file"),
                               ([path, "--compare", tmp_path / "no.jsonl", "--out", tmp_path / "r.json"], "no.jsonl does not exist"),
                               ([path, "--out", tmp_path], "is a folder: name the file, as in .*result.json"),
                               ([path, "--out", tmp_path / "." / path.name], "would replace the samples")]:
        with pytest.raises(ValueError, match=message):
            commands.score([str(argument) for argument in arguments])
    assert [path] == list(tmp_path.iterdir()) and len(path.read_text().splitlines()) == len(SAMPLES)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = write(tmp_path, SAMPLES)
    path.write_bytes("\ufeff".encode() + path.read_bytes().replace(b"\n", b"\r\n"))
    assert score(path)["n"] == len(SAMPLES)


@pytest.mark.skipif(not SOLUTIONS.is_file(), reason="needs ../shared/data/gsm8k")
def test_four_models_stored_verdicts(tmp_path):
    """GSM8K's example solutions (Cobbe et al. 2021): the authors' `is_correct` of each of 1,319 questions and four models."""
    rows = [json.loads(line) for line in SOLUTIONS.read_text(encoding="utf-8").splitlines()]
    for model, accuracy in [("6b_finetuning", 21.68), ("6b_verification", 39.04), ("175b_finetuning", 34.72), ("175b_verification", 56.25)]:
        path = write(tmp_path, [{"id": i, "gold": row["ground_truth"], "samples": [row[model]["solution"]]} for i, row in enumerate(rows)])
        for answer_type in (None, "number"):
            result = score(path, Rules(answer_type=answer_type))
            assert [item["correct"] for item in result["items"]] == [row[model]["is_correct"] for row in rows]
            assert result["accuracy"] == pytest.approx(accuracy / 100, abs=5e-5) and result["n"] == 1319
