"""stages.evals.rewardbench: forms of rows by hand, bad rows by file and line, and the whole program on a tiny random model."""
import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from reward.calibration import Accuracy
from stages.evals import rewardbench
from stages.evals.rewardbench import arguments, as_record, evaluate, mean_of_subsets, right
from tests.rl_tiny import write_parents


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_parents(tmp_path_factory.mktemp("runs")) / "reward_model" / "model"


@pytest.mark.parametrize(("row", "responses", "ranks"), [
    ({"chosen": "a", "rejected": "b"}, ["a", "b"], [1, 2]),
    ({"chosen": ["a"], "rejected": ["b", "c", "d"]}, ["a", "b", "c", "d"], [1, 2, 2, 2]),
    ({"chosen": ["a", "b"], "rejected": "c"}, ["a", "b", "c"], [1, 1, 2]),
    ({"responses": ["a", "b", "c"], "correct": [0, 2]}, ["a", "b", "c"], [1, 2, 1]),
    ({"responses": ["a", "b", "c"], "correct": [False, True, False]}, ["a", "b", "c"], [2, 1, 2]),
    ({"responses": ["a", "b"], "best": 1}, ["a", "b"], [2, 1]),
    ({"responses": '["a", "b"]', "best": "1"}, ["a", "b"], [2, 1])])
def test_forms_of_rows(row, responses, ranks):
    record = as_record({"prompt": "p", **row}, "here")
    assert record["responses"] == responses and record["ranks"] == ranks and record["prompt"] == "p"


@pytest.mark.parametrize(("row", "message"), [
    ({"chosen": "a"}, "neither chosen and rejected nor responses"), ({"chosen": ["a"], "rejected": []}, "1 right and 0 wrong responses"),
    ({"chosen": ["a"], "rejected": None}, "1 right and 0 wrong"), ({"responses": ["a", "b"], "best": 2}, "give places from 0 to 1"),
    ({"responses": ["a", "b"], "correct": [True]}, "for each of the 2 responses"), ({"responses": ["a", "b"]}, "without correct or best"),
    ({"responses": ["a", "b"], "correct": [0, 1]}, "2 right and 0 wrong"), ({"responses": ["a", 3], "best": 0}, "responses must be texts"),
    ({"responses": "a", "best": 0}, "'a' is not a JSON list"), ({"chosen": "a", "rejected": "b", "prompt": ""}, "no 'prompt'")])
def test_rows_that_are_none_name_their_fault(row, message):
    with pytest.raises(ValueError, match=message) as error:
        as_record({"prompt": "p", **row}, "file, line 7")
    assert str(error.value).startswith("file, line 7: ")


def test_right_is_the_highest_score_and_ties_share():
    assert right([3.0, 1.0, 2.0], [1, 2, 2]) == 1 and right([1.0, 3.0], [1, 2]) == 0
    assert right([2.0, 2.0, 2.0, 1.0], [1, 2, 2, 1]) == pytest.approx(1 / 3)


def test_mean_of_subsets_weighs_them_alike():
    found = [Accuracy(0.5, 1000, 1000, 0.4, 0.6), Accuracy(1.0, 10, 10, 0.7, 1.0)]
    mean, low, high = mean_of_subsets(found)
    assert mean == 0.75 and low == pytest.approx(0.75 - math.hypot(0.1, 0.3) / 2) and high == pytest.approx(0.75 + 0.1 / 2)


ROWS = [{"id": i, "prompt": f"What is {i} + 1?", "chosen": [f"The answer is {i + 1}."], "subset": "sums" if i % 2 else "more",
         "rejected": [f"The answer is {i + k}." for k in (2, 3, 4)]} for i in range(8)]
BAD = [{"prompt": "Who?", "chosen": "I."}, {"prompt": "Long " * 200, "chosen": "a", "rejected": "b"}]


def test_whole_program(model, tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "bench.jsonl", tmp_path / "out" / "result.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in [BAD[0], *ROWS, BAD[1]]))
    # Scores by what the rows say: the right response of every row of `sums`, the last wrong one of every row of `more`.
    monkeypatch.setattr(rewardbench, "score_groups", lambda m, groups, batch_size: [[0.0] * 4 for _ in groups])
    tied = evaluate(arguments(["--model", str(model), "--data", str(file), "--out", str(out)]))
    assert {key: value["value"] for key, value in tied["metrics"].items()} == {
        "accuracy/more": 0.25, "accuracy/sums": 0.25, "mean_of_subsets": 0.25}  # a model without opinion is at chance of four
    monkeypatch.undo()
    result = evaluate(arguments(["--model", str(model), "--data", str(file), "--out", str(out)]))
    assert json.loads(out.read_text())["metrics"] == result["metrics"] and len(result["items"]) == 8
    for subset in ("sums", "more"):
        mine = [item["right"] for item in result["items"] if item["subset"] == subset]
        entry = result["metrics"][f"accuracy/{subset}"]
        assert entry["n"] == len(mine) == 4 and entry["value"] == sum(mine) / 4 and entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]
    assert [fault.partition(": ")[0] for fault in result["left_out"]] == [f"{file}, line 1", f"{file}, line 10"]
    assert "more than the model's context of 160" in result["left_out"][1]
    printed = capsys.readouterr().out
    assert f"left out 2 of 10 rows (all of them in {out}), the first: {file}, line 1: neither chosen" in printed
    assert "mean of subsets" in printed and result["data"][str(file)].startswith("sha256:")


def test_scores_are_those_of_the_chat_template(model, tmp_path):
    from transformers import AutoTokenizer

    from reward.model import score_ids
    from stages.data.tokenizer import chat_ids

    file = tmp_path / "pairs.csv"
    with file.open("w", newline="") as f:
        csv.writer(f).writerows([["prompt", "chosen", "rejected"], ["Who?", "It was I.", "Nobody, really"]])
    result = evaluate(arguments(["--model", str(model), "--data", str(file), "--out", str(tmp_path / "r.json")]))
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [chat_ids(tokenizer, [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": text}])
            for text in ("It was I.", "Nobody, really")]
    scores = score_ids(AutoModelForSequenceClassification.from_pretrained(model), rows)
    assert result["items"][0]["scores"] == pytest.approx(scores) and result["items"][0]["right"] == float(scores[0] > scores[1])
    assert result["items"][0]["subset"] == "all"


def test_an_ensemble_is_scored_as_it_combines_its_members(model, tmp_path):
    """A second member whose head is the first one's turned round: their mean has no opinion, their worst case has one."""
    folder, file = tmp_path / "ensemble", tmp_path / "pairs.jsonl"
    shutil.copytree(model, folder)
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    other = AutoModelForSequenceClassification.from_pretrained(model)
    other.score.weight.data.neg_()
    other.save_pretrained(folder / "members/1")
    facts = {"members": [(0.0, 1.0), (0.0, 1.0)], "combined": {"mean": (0.0, 1.0), "min": (0.0, 1.0), "mean_std": (0.0, 1.0)},
             "combination": "mean", "std_coef": 1.0, "folders": ["members/1"]}
    (folder / "ensemble.json").write_text(json.dumps(facts))

    def scores(path, *more):
        result = evaluate(arguments(["--model", str(path), "--data", str(file), "--out", str(tmp_path / "r.json"), *more]))
        return [score for item in result["items"] for score in item["scores"]]

    alone = scores(model)
    assert scores(folder) == pytest.approx([0.0] * len(alone), abs=1e-6)
    assert scores(folder, "--combination", "min") == pytest.approx([-abs(score) for score in alone], abs=1e-6)
    with pytest.raises(ValueError, match="not an ensemble"):
        scores(model, "--combination", "min")


@pytest.mark.parametrize(("text", "message"), [
    ('{"prompt": "p", "chosen": "a"}\n', "no row is left to score; the first fault: .*line 1: neither"), ("[]\n", "it has no rows"),
    ("{\n", "line 1 is not JSON")])
def test_nothing_to_score_is_one_line(model, tmp_path, text, message):
    file = tmp_path / "b.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        evaluate(arguments(["--model", str(model), "--data", str(file), "--out", str(tmp_path / "r.json")]))


def test_no_model_is_one_line_of_the_program(tmp_path):
    done = subprocess.run([sys.executable, "-m", "stages.evals.rewardbench", "--model", str(tmp_path), "--data", "x.jsonl"],
                          capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "has no config.json" in done.stderr
