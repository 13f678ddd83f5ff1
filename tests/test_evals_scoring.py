"""The score command: votes over samples from anywhere, worked by hand; and the figures of a cell."""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from prompts.intervals import wilson
from prompts.records import Request, Result, Step
from prompts.strategies import conclude
from stages import evaluation
from stages.evals import scoring

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = [
    # three spellings of one number beat two abstentions and another number
    {"id": "a", "gold": "18", "samples": ["The answer is 18.", "[invalid]", "so #### 18.0", "no idea", "The answer is 7.", "$18"]},
    {"id": "b", "gold": "x = 2\n#### 2", "samples": ["The answer is 3.", "The answer is 2."]},  # a tie: the first seen, 3, is wrong
    {"id": "c", "gold": 5, "samples": ["I do not know.", "42 or so"]},  # nothing to vote for: wrong
    {"id": "d", "gold": "B", "samples": [{"text": "The answer is (A).", "answer": "B", "tokens": 5}]},  # a given answer counts
    {"id": "e", "gold": "1", "samples": []}]


def write(tmp_path, rows):
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_score_by_hand(tmp_path):
    result = scoring.score(write(tmp_path, SAMPLES))
    assert [(i["id"], i["answer"], i["correct"], i["samples_used"]) for i in result["items"]] == [
        ("a", "18", True, 6), ("b", "3", False, 2), ("c", None, False, 2), ("d", "B", True, 1), ("e", None, False, 0)]
    assert (result["accuracy"], result["n"], tuple(result["wilson95"])) == (0.4, 5, wilson(2, 5))
    assert (result["unparsed"], result["unanswered"], result["ties"]) == (4, 2, 1)
    assert result["samples_used_mean"] == 11 / 5 and result["tokens_mean"] is None


def test_tokens_are_per_question(tmp_path):
    rows = [{"id": i, "gold": "1", "samples": [{"text": "The answer is 1.", "tokens": t} for t in tokens]}
            for i, tokens in enumerate([[4, 6], [5, 7], [[1, 2, 3]]])]
    assert scoring.score(write(tmp_path, rows))["tokens_mean"] == 25 / 3


@pytest.mark.parametrize("rows, message", [
    ([{"id": "a", "gold": "1"}], r"line 1: no key 'samples'"), ([SAMPLES[0], SAMPLES[0]], r"line 2: id 'a' was there before"),
    ([{"id": "a", "gold": "1", "samples": [3]}], r"line 1: expected each sample to be a text"), ([], "holds no samples"),
    ([{"id": "a", "gold": None, "samples": []}], r"line 1: expected a gold answer"),
    ([{"id": "a", "gold": "1", "samples": "x"}], r"line 1: expected a gold answer and a list of samples")])
def test_bad_samples(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        scoring.score(write(tmp_path, rows))


def test_command(tmp_path):
    arguments = ["score", "--samples", str(write(tmp_path, SAMPLES)), "--out", str(tmp_path / "new" / "result.json")]
    evaluation.score(arguments[1:])
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == json.loads(json.dumps(scoring.score(arguments[2])))
    (tmp_path / "samples.jsonl").write_text("{}\nx\n")
    done = subprocess.run([sys.executable, "-m", "stages.evaluation", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "samples.jsonl, line 1" in done.stderr


def made(id, gold, *texts):
    row = {"id": id, "task": "t", "difficulty": 1, "question": "?", "answer": gold, "solutions": [["Start 2."]]}
    samples = [Result(text=t, prompt_tokens=4, generated_tokens=8, finish="stop" if t.endswith(".") else "length") for t in texts]
    trace = tuple(Step(Request(prompt="?", question=id), sample) for sample in samples)
    return scoring.record(row, replace(conclude(samples), trace=trace))


def test_cell_by_hand():
    records = [made("a", "2", "Start 2. The answer is 2.", "The answer is 3."), made("b", "4", "The answer is 4.", "Start 2. The answer")]
    cell = scoring.summary(records)
    assert (cell["accuracy"], cell["n"], cell["unparsed"], cell["ties"], cell["tokens_mean"]) == (1.0, 2, 1, 1, 16.0)
    assert cell["finished"] == 0.75 and cell["in_format"] == 0.75 and cell["unparsed_rate"] == 0.25
    # all right; nothing right; answer right; a step right but no answer, no end and one sentence too many
    assert cell["gold_score"] == pytest.approx((1.5 + 0 + 1 + 0.5 - 0.3) / 4)
    sampled = scoring.sampled_summary(records)
    assert sampled["accuracy"] == 0.5 and sampled["tokens_mean"] == 8.0 and sampled["unparsed_rate"] == 0.25


def test_comparisons_pair_by_problem():
    greedy = [made("a", "2", "The answer is 2."), made("b", "4", "The answer is 1."), made("c", "4", "The answer is 1.")]
    votes = [made("c", "4", "The answer is 4.", "The answer is 1."), made("a", "2", "The answer is 2.", "The answer is 2."),
             made("b", "4", "The answer is 1.", "The answer is 1.")]  # another order
    cells = {("sft", "t", "zero_shot_cot"): greedy, ("sft", "t", "self_consistency"): votes}
    found = {(c["a"], c["b"]): c for c in scoring.comparisons(cells)}
    greedy_pair = found["sft/self_consistency", "sft/zero_shot_cot"]
    assert (greedy_pair["only_a"], greedy_pair["only_b"]) == (1, 0) and greedy_pair["difference"] == pytest.approx(1 / 3)
    assert found["sft/self_consistency", "sft/sampled_cot"]["difference"] == pytest.approx((0.5 + 0 + 0) / 3)


def test_cells_count_what_the_program_says_where_equality_cannot_judge():
    row = {"id": "a", "task": "game24", "difficulty": 1, "question": "?", "answer": "(1 * 1) * (4 * 6)", "solutions": [],
           "numbers": [1, 1, 4, 6], "verifier": "game24"}
    results = [Result(text=f"The answer is {answer}.", prompt_tokens=9, generated_tokens=5, finish="stop")
               for answer in ("4 * 6 / 1 / 1", "24", "6 * 4 * 1")]
    records = [scoring.record(row, conclude([result])) for result in results]
    assert [r["correct"] for r in records] == [r["samples"][0]["correct"] for r in records] == [True, False, False]
    cell = scoring.summary(records)
    assert cell["accuracy"] == 1 / 3 and cell["n"] == 3 and cell["unanswered"] == 0 and scoring.shares(records) == [1, 0, 0]
