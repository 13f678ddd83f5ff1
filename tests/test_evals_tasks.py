"""Reading problems: the embedded ones and three benchmarks' formats; bad files are named with their line."""
import json
from pathlib import Path

import pytest

from prompts.answers import extract
from prompts.templates import BENCHMARK_CUES
from stages.data import curriculum
from stages.data.benchmarks import fits
from stages.evals.tasks import load_task, read_prompt

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


WORKED_PROMPT = """A task of sums.

Q: Ann has 2 pens and gets 3. How many?
A: Let's think step by step.
She starts with 2.
2 + 3 = 5. So the answer is 5.

Q: Bob has 4 pens and
loses 1. How many?
A: Let's think step by step.
4 - 1 = 3. So the answer is (B).
"""
BARE_PROMPT = "Question: 2 + 3?\nLet's think step by step\n2 + 3 = 5.\nThe answer is 5.\n\nQuestion: 4 + 4?\nThe answer is 8.\n"


def own(tmp_path, *questions, name="a.jsonl"):
    return f"problems:{write(tmp_path, ''.join(json.dumps({'question': q, 'answer': 1}) + chr(10) for q in questions), name)}"


def test_prompts_of_papers_are_read_in_both_spellings(tmp_path):
    first, second = read_prompt(write(tmp_path, WORKED_PROMPT, "sums.txt"))
    assert first["question"] == "Ann has 2 pens and gets 3. How many?" and first["solutions"] == [["She starts with 2.", "2 + 3 = 5."]]
    assert (first["answer"], second["answer"]) == ("5", "B") and second["question"] == "Bob has 4 pens and\nloses 1. How many?"
    bare = read_prompt(write(tmp_path, BARE_PROMPT, "bare.txt"))
    assert [(r["question"], r["answer"], r["solutions"]) for r in bare] == [("2 + 3?", "5", [["2 + 3 = 5."]]), ("4 + 4?", "8", [])]


def test_a_prompt_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none.txt does not exist: name a file with worked examples in exemplars"):
        read_prompt(tmp_path / "none.txt")


@pytest.mark.parametrize("text, message", [("Nothing here.", "has no example: each begins with"),
                                           ("Q: 2 + 3?\nA: It is 5.\n", "example 0 has no question, or does not end with"),
                                           ("Q: 1?\nA: The answer is 1.\n\nQ:\nA: The answer is 2.\n", "example 1 has no question")])
def test_prompts_without_examples_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"p\.txt.*{message}"):
        read_prompt(write(tmp_path, text, "p.txt"))


def test_a_prompt_is_shown_in_its_order_and_records_are_drawn_by_seed(tmp_path):
    spec = own(tmp_path, "7 + 7?", "8 + 8?")
    task = load(spec, tmp_path, examples=str(write(tmp_path, BARE_PROMPT, "bare.txt")))
    assert [[e["answer"] for e in task.examples(row, 2, seed)] for row in task.rows for seed in (0, 1)] == 4 * [["5", "8"]]
    pool = own(tmp_path, *(f"{i} + 0?" for i in range(50)), name="train.jsonl")
    task = load(spec, tmp_path, examples=pool)
    first, second = task.rows
    assert task.examples(first, 5, 0) == task.examples(first, 5, 0) != task.examples(second, 5, 0) != task.examples(second, 5, 1)
    with pytest.raises(ValueError, match="problems has 50 examples: set shots to at most that, not 51, or name a source of more"):
        task.examples(first, 51, 0)


def test_an_example_that_is_asked_is_left_out_where_drawn_and_refused_in_a_prompt(tmp_path):
    asked = own(tmp_path, "2  + 3?", "9 + 9?")
    task = load(asked, tmp_path, examples=own(tmp_path, "2 + 3?", "1 + 1?", " 9 + 9? ", name="train.jsonl"))
    assert [row["question"] for row in task.pool] == ["1 + 1?"] and task.leaked == 2
    with pytest.raises(ValueError, match=r"bare\.txt: example bare-0 is one of the problems of problems:.*take it out of either file"):
        load(asked, tmp_path, examples=str(write(tmp_path, BARE_PROMPT, "bare.txt")))


def test_made_tasks_show_examples_of_their_training_split(tmp_path):
    task = load("coin_flip:3?size=40", tmp_path)
    assert len(task.rows) == len(task.pool) == 40 and task.leaked == 0 and task.cues == BENCHMARK_CUES
    assert all(row["solutions"] for row in task.pool)


def test_benchmarks_without_examples_of_the_projects_own_ask_for_a_source(tmp_path):
    task = load(f"bbh:{write(tmp_path, json.dumps({'input': '?', 'target': 'No'}))}", tmp_path)
    with pytest.raises(ValueError, match="bbh has no examples of its own: name a source of 2 or more in exemplars"):
        task.examples(task.rows[0], 2, 0)


@needs_data
def test_the_prompts_of_wei_and_suzgun_et_al_are_read_whole(tmp_path):
    eight = read_prompt(DATA / "cot-exemplars" / "prompt_original.txt")
    assert [row["answer"] for row in eight] == ["6", "5", "39", "8", "9", "29", "33", "8"] and all(row["solutions"] for row in eight)
    bbh = {path.stem: read_prompt(path) for path in sorted((DATA / "bbh").glob("*.txt")) if path.stem != "SOURCE"}
    assert len(bbh) == 27 and {len(rows) for rows in bbh.values()} == {3}
    for name, rows in bbh.items():
        task = load(f"bbh:{DATA}/bbh/{name}.json", tmp_path, examples=str(DATA / "bbh" / f"{name}.txt"))
        assert len(task.examples(task.rows[0], 3, 0)) == 3 and [e["answer"] for e in rows] == [e["answer"] for e in task.pool]


def test_embedded_problems_say_what_their_answers_are():
    for name in curriculum.TASKS:
        row = next(curriculum.problems(0, split="test", tasks={name: 1.0})).as_row()
        assert row["answer_type"] == ("string" if name == "last_letters" else "number") and fits(row["answer"], row["answer_type"])
        assert extract(f"The answer is {row['answer']}.", row["answer_type"]) == row["answer"]
