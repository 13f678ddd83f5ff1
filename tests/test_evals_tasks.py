"""Reading problems: the embedded ones and three benchmarks' formats; bad files are named with their line."""
import json
from pathlib import Path

import pytest

from stages.data import curriculum
from stages.evals.tasks import load_task

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="benchmark files are not on this machine")
GSM8K = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 in May\nTotal 72.\n#### 1,072"}


@pytest.fixture
def problems(tmp_path):
    for split, drawn_from in (("sft", "train"), ("test", "test")):
        source = curriculum.problems(0, split=drawn_from, difficulties=(1, 2, 3))
        rows = {p.id: p.as_row() for p, _ in zip(source, range(300), strict=False)}
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    return tmp_path


def load(spec, folder, num_problems=0, **more):
    return load_task(spec, problems=folder, **{"difficulties": [1, 2], "seed": 0, "num_problems": num_problems} | more)


def write(tmp_path, text, name="a.jsonl"):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path / name


def test_embedded_problems_are_balanced_and_examples_come_from_elsewhere(problems):
    task = load("word_problems", problems, 21)
    assert [sum(r["difficulty"] == d for r in task.rows) for d in (1, 2, 3)] == [11, 10, 0]
    test_ids = {json.loads(line)["id"] for line in (problems / "test.jsonl").read_text().splitlines()}
    assert {r["id"] for r in task.rows} <= test_ids and not {r["id"] for r in task.pool} & test_ids
    first, second = task.rows[:2]
    assert task.examples(first, 3, 0) == task.examples(first, 3, 0) != task.examples(second, 3, 0)
    assert load("word_problems", problems, 21).rows == task.rows != load("word_problems", problems, 21, seed=1).rows
    with pytest.raises(ValueError, match=r"difficulty 1, has \d+ test problems but 500 are asked for"):
        load("word_problems", problems, 1000)
    with pytest.raises(ValueError, match="set shots to at most"):
        task.examples(first, 10_000, 0)


def test_formats(tmp_path):
    gsm8k = load(f"gsm8k:{write(tmp_path, json.dumps(GSM8K))}", tmp_path).rows[0]
    assert gsm8k["answer"] == "1,072" and gsm8k["solutions"] == [["48/2 = 24 in May.", "Total 72."]]
    entries = [{"Body": "Ann has 3 pens.", "Question": "How many?", "Answer": 3.0}]
    svamp = load(f"svamp:{write(tmp_path, json.dumps(entries, indent=1), 'SVAMP.json')}", tmp_path).rows[0]
    assert (svamp["question"], svamp["answer"]) == ("Ann has 3 pens. How many?", "3.0")
    row = {"question": "2 + 2?", "options": ["A)3", "B)4", "C)C)5"], "correct": "B"}
    aqua = load(f"choices=aqua:{write(tmp_path, json.dumps(row), 'test.json')}", tmp_path)
    assert aqua.name == "choices" and aqua.rows[0]["question"] == "2 + 2? Choices: (A) 3 (B) 4 (C) 5" and aqua.rows[0]["answer"] == "B"
    own = load(f"problems:{write(tmp_path, json.dumps({'id': 7, 'question': '1 + 1?', 'answer': 2}))}", tmp_path).rows[0]
    assert (own["id"], own["answer"]) == ("7", "2")


@pytest.mark.parametrize("spec, text, message", [
    ("gsm8k", json.dumps(GSM8K) + "\n{broken\n", r"a\.jsonl, line 2"),
    ("gsm8k", "[1, 2]", r"a\.jsonl, row 0 must be a JSON object, got int"),
    ("gsm8k", "\n3\n", r"a\.jsonl, line 2 must be a JSON object"),
    ("gsm8k", json.dumps({"question": "?", "answer": "72"}), r"a\.jsonl, line 1: the answer has no '####' line"),
    ("gsm8k", json.dumps({"question": "?", "answer": "x #### "}), r"a\.jsonl, line 1: no answer to compare with"),
    ("gsm8k", json.dumps({"answer": "#### 7"}), r"a\.jsonl, line 1: no key 'question'; it has answer"),
    ("gsm8k", json.dumps({"question": None, "answer": "#### 7"}), r"a\.jsonl, line 1: the question is not a text"),
    ("aqua", json.dumps({"question": "?", "options": None, "correct": "A"}), r"a\.jsonl, line 1"),
    ("problems", 2 * (json.dumps({"id": "a", "question": "?", "answer": 1}) + "\n"), r"line 2: id 'a' was there before"),
    ("gsm8k", b'{"question": "\xff"}', r"a\.jsonl.*not UTF-8"), ("gsm8k", "\0\1\2", r"a\.jsonl is binary")])
def test_bad_files_are_named(tmp_path, spec, text, message):
    with pytest.raises(ValueError, match=message):
        load(f"{spec}:{write(tmp_path, text)}", tmp_path)


@pytest.mark.parametrize("spec, message", [
    ("word_problem", "unknown task 'word_problem': expected one of word_problems"), ("arc:x.jsonl", "format:source with a format of gsm8k"),
    ("gsm8k:missing.jsonl", "missing.jsonl: no such file"), ("gsm8k:no/such/thing", "no/such/thing .* from the hub failed")])
def test_unknown_tasks(tmp_path, spec, message):
    with pytest.raises(ValueError, match=message):
        load(spec, tmp_path)


@needs_data
@pytest.mark.parametrize("spec, count, answer", [
    ("gsm8k:{}/gsm8k/test.jsonl", 1319, "18"), ("svamp:{}/svamp/SVAMP.json", 1000, "51.0"), ("aqua:{}/aqua/test.json", 254, "A")])
def test_real_files(tmp_path, spec, count, answer):
    task = load(spec.format(DATA), tmp_path)
    assert len(task.rows) == count and task.rows[0]["answer"] == answer
    assert len(load(spec.format(DATA), tmp_path, 50).rows) == 50
