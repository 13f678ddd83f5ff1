import itertools
import json
from collections import Counter

import pytest

from stages.data import curriculum, dialogues
from stages.data.dialogues import BadRow, Source, apportion, normalise, parse_sources
from stages.data.instructions import instructions

GOOD = {"prompt": "q", "completion": "a"}


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problems")
    for name, split in (("sft", "train"), ("validation", "validation")):
        known = {p.id: p.as_row() for p in itertools.islice(curriculum.problems(0, split=split), 300)}
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in known.values()))
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(path, count, word="q"):
    return write(path, [{"prompt": f"{word}{i}", "completion": f"a{i}"} for i in range(count)])


def read(given, **more):
    sources = parse_sources(given)
    return dialogues.read(sources, **{"problems": None, "seed": 0, "num_rows": 0, "validation_rows": 0, **more})


def one(row, where="f, line 1", **columns):
    return normalise(row, dialogues.detect(row, columns, where), columns, where)


def turns(row):
    return [(turn["role"], turn["content"]) for turn in row["messages"]]


def test_dialogues_hold_as_many_of_each_task_and_examples_of_that_task():
    known = list({p.id: p.as_row() for p in itertools.islice(curriculum.problems(0, split="train"), 400)}.values())
    task_of = {p["question"]: p["task"] for p in known}
    rows = dialogues.curriculum_rows(known, seed=0, count=400, worked_share=0.7, few_shot_share=0.5)
    assert Counter(next(p["task"] for p in known if p["id"] == row["id"]) for row in rows) == dict.fromkeys(curriculum.TASKS, 100)
    for row in rows:
        asked = [turn["content"].rsplit(" " + curriculum.CUES[row["style"]])[0] for turn in row["prompt"] if turn["role"] == "user"]
        assert len(set(asked)) == len(asked)  # no example is the question itself
        assert len({task_of[question] for question in asked}) == 1
    assert {len(row["prompt"]) for row in rows} == {1, 3, 5, 7}


def test_the_curriculum_as_a_source_is_curriculum_rows_in_their_order(problems):
    mixture = read([{"data": "curriculum"}], problems=problems, num_rows=60, validation_rows=20, seed=3)
    for rows, name, count in ((mixture.train, "sft", 60), (mixture.validation, "validation", 20)):
        known = dialogues.read_problems(problems / f"{name}.jsonl")
        expected = dialogues.curriculum_rows(known, seed=3, count=count, worked_share=0.7, few_shot_share=0.15)
        assert [(r["id"], r["messages"], r["first"]) for r in rows] == [
            (e["id"], e["prompt"] + e["completion"], len(e["prompt"])) for e in expected]
    assert {r["first"] for r in mixture.train} > {1} and mixture.counts["curriculum"]["train"] == 60


def test_tasks_and_shares_of_the_curriculum(problems):
    rows = read([{"data": "curriculum", "name": "letters", "tasks": ["last_letters"], "worked_share": 0, "few_shot_share": 0}],
                problems=problems, num_rows=40).train
    for row in rows:
        (_, question), (_, answer) = turns(row)
        assert question.startswith("Join the last letters") and question.endswith("Answer directly.") and answer.startswith("The answer is")
    assert {row["source"] for row in rows} == {"letters"}
    counts = read([{"data": "curriculum"}], problems=problems, num_rows=400).counts["curriculum"]
    assert counts["repeated"] == 400 - len({r["id"] for r in read([{"data": "curriculum"}], problems=problems, num_rows=400).train}) > 0


@pytest.mark.parametrize(("row", "columns", "expected", "first"), [
    (GOOD, {}, [("user", "q"), ("assistant", "a")], 1),
    ({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
      "completion": [{"role": "assistant", "content": "a"}]}, {}, [("system", "s"), ("user", "q"), ("assistant", "a")], 2),
    ({"question": "q", "answer": "a"}, {"prompt": "question", "completion": "answer"}, [("user", "q"), ("assistant", "a")], 1),
    ({"messages": [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "a"}], "prompt": "q", "prompt_id": "7"},
     {}, [("user", "q"), ("assistant", "a")], 0),
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"},
                        {"from": "user", "value": "r"}, {"from": "assistant", "value": "b"}]},
     {}, [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")], 0),
    ({"talk": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, {"messages": "talk"},
     [("user", "q"), ("assistant", "a")], 0),
    ({"instruction": "do", "input": "x", "output": "a", "text": "all"}, {}, [("user", "do\n\nx"), ("assistant", "a")], 1),
    ({"instruction": "do", "input": "", "output": "a"}, {}, [("user", "do"), ("assistant", "a")], 1),
    ({"instruction": "do", "input": None, "output": "a"}, {}, [("user", "do"), ("assistant", "a")], 1),
    ({"instruction": "do", "context": "x", "response": "a"}, {"input": "context", "output": "response"},
     [("user", "do\n\nx"), ("assistant", "a")], 1),
    ({"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: b", "rejected": "x"}, {},
     [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")], 0),
    ({"prompt": "q", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, {},
     [("user", "q"), ("assistant", "a")], 0),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, {}, [("user", "q"), ("assistant", "a")], 1)])
def test_every_format_becomes_messages(row, columns, expected, first):
    got = one(row, **columns)
    assert turns(got) == expected and got["first"] == first
    assert all(set(turn) == {"role", "content"} for turn in got["messages"])


def test_plain_text_and_a_chosen_format():
    assert one({"text": "a play"}) == {"text": "a play"} and one({"body": "x", "text": "y"}, text="body") == {"text": "x"}
    assert normalise({"messages": 1, "text": "a play"}, "text", {}, "here") == {"text": "a play"}


def talk(*said):
    return {"messages": [{"role": role, "content": content} for role, content in said]}


@pytest.mark.parametrize(("row", "columns", "reason"), [
    ({"prompt": "q", "answer": "a"}, {},
     "cannot tell its format: it has prompt, answer; expected one of: prompt and completion; messages;"),
    ({"question": "q"}, {"prompt": "question", "completion": "answer"},
     "no column 'answer' for completion: it has question; set columns: {completion: ...}"),
    ({"prompt": "q", "completion": ""}, {}, "an empty completion"),
    ({"prompt": "q", "completion": " \n"}, {}, "an empty completion"),
    ({"prompt": "q", "completion": None}, {}, "an empty completion"),
    ({"prompt": "q", "completion": []}, {}, "an empty completion"),
    ({"prompt": "", "completion": "a"}, {}, "an empty prompt"),
    ({"instruction": "do", "output": ""}, {}, "an empty output"),
    ({"instruction": "do", "output": "a"}, {"input": "context"}, "no column 'context' for input: it has instruction, output"),
    ({"instruction": "do", "input": 3, "output": "a"}, {}, "input is not text but 3"),
    ({"text": " "}, {}, "an empty text"),
    ({"text": 5}, {}, "text is not text but 5"),
    ({"prompt": 5, "completion": "a"}, {}, "expected text or a list of {'role', 'content'}, got 5"),
    ({"prompt": {"role": "user", "content": "q"}, "completion": "a"}, {}, "expected text or a list of {'role', 'content'}, got {'role'"),
    ({"prompt": ["q", 5], "completion": "a"}, {}, "expected text or a list of {'role', 'content'}, got ['q', 5]"),
    ({"messages": "hello"}, {}, "expected a list of {'role', 'content'}, got 'hello'"),
    (talk(("user", [{"type": "text", "text": "q"}]), ("assistant", "a")), {}, "the content of a turn (user) is not text but [{'type'"),
    (talk(("user", "q"), ("bot", "a")), {}, "unknown role 'bot': use system, user or assistant"),
    (talk(("user", "q"), ("assistant", " ")), {}, "turn 2 (assistant) is empty"),
    (talk(("user", "q"), ("assistant", None)), {}, "turn 2 (assistant) is empty"),
    (talk(("user", "q"), ("assistant", "a"), ("assistant", "b")), {}, "two assistant turns in a row (turns 2 and 3)"),
    (talk(("user", "q"), ("user", "r"), ("assistant", "b")), {}, "two user turns in a row (turns 1 and 2)"),
    (talk(("user", "q"), ("system", "s"), ("assistant", "b")), {}, "turn 2 is a system turn: only the first may be"),
    (talk(("user", "q"), ("assistant", "a"), ("user", "r")), {}, "the dialogue does not end with the assistant's turn but with the user's"),
    (talk(("system", "s"), ("user", "q")), {}, "no assistant turn: nothing to learn"),
    ({"prompt": talk(("user", "q"), ("assistant", "a"))["messages"], "completion": "b"}, {}, "two assistant turns in a row (turns 2"),
    ({"chosen": "just words"}, {}, "expected turns that begin with 'Human:' or 'Assistant:', got 'just words'"),
    ({"chosen": "\n\nHuman: q\n\nAssistant:"}, {}, "turn 2 (assistant) is empty")])
def test_a_bad_row_stops_with_file_and_line_or_is_dropped_and_listed(tmp_path, row, columns, reason):
    good = {**{columns.get(k, k): v for k, v in GOOD.items()}} if {"prompt", "completion"} >= set(columns) else None
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(BadRow) as error:
        read([{"data": path, "columns": columns}])
    assert str(error.value).startswith(f"{path}, line 1: {reason}") and "\n" not in str(error.value)
    assert str(error.value).endswith("; `bad_rows: drop` leaves such rows out and lists them")
    with pytest.raises(ValueError, match="has no rows that can be used: 1 dropped, the first,"):
        read([{"data": path, "columns": columns}], bad_rows="drop")
    if good and set(row) <= {"prompt", "completion"}:
        write(tmp_path / "a.jsonl", [good, row, good])
        mixture = read([{"data": path, "columns": columns}], bad_rows="drop")
        assert len(mixture.train) == 2
        assert mixture.counts["a"] == {"read": 3, "filtered": 0, "dropped": 1, "train": 2, "repeated": 0, "validation": 0}
        (dropped,) = mixture.dropped
        assert dropped["where"] == f"{path}, line 2" and dropped["reason"].startswith(reason[:20]) and dropped["source"] == "a"


def test_the_first_row_decides_the_format_of_all(tmp_path):
    path = write(tmp_path / "a.jsonl", [GOOD, {"prompt": "q", "text": "not an answer"}])
    with pytest.raises(BadRow, match="line 2: no column 'completion' for completion: it has prompt, text"):
        read([{"data": path}])


def test_files_of_every_kind(tmp_path):
    import pandas

    pandas.DataFrame({"messages": [talk(("user", "q"), ("assistant", "a"))["messages"]]}).to_parquet(tmp_path / "p.parquet")
    (tmp_path / "c.csv").write_text('prompt,completion\nq,"a, ""b""\nc"\nr,\n')
    (tmp_path / "t.tsv").write_text("question\tanswer\nq\ta\n")
    (tmp_path / "j.json").write_text(json.dumps([GOOD]))
    mixture = read([{"data": str(tmp_path / "p.parquet")}, {"data": str(tmp_path / "c.csv")}, {"data": str(tmp_path / "j.json")},
                    {"data": str(tmp_path / "t.tsv"), "columns": {"prompt": "question", "completion": "answer"}}], bad_rows="drop")
    assert [turns(row)[-1][1] for row in mixture.train] == ["a", 'a, "b"\nc', "a", "a"]
    assert list(mixture.counts) == ["p", "c", "j", "t"]
    assert mixture.dropped == [{"where": f"{tmp_path / 'c.csv'}, line 4", "reason": "an empty completion", "source": "c"}]
    (tmp_path / "a.txt").write_text("a play")
    with pytest.raises(ValueError, match=r"a.txt has no rows with columns: give .jsonl, .jsonl.gz, .json, .parquet, .csv, .tsv"):
        read([{"data": str(tmp_path / "a.txt")}])


def test_weights_divide_the_rows_and_short_sources_repeat(tmp_path):
    data = [{"data": numbered(tmp_path / "a.jsonl", 10, "a"), "weight": 3}, {"data": numbered(tmp_path / "b.jsonl", 100, "b")}]
    mixture = read(data, num_rows=42, validation_rows=4)
    assert mixture.counts == {"a": {"read": 10, "filtered": 0, "dropped": 0, "train": 32, "repeated": 25, "validation": 3},
                              "b": {"read": 100, "filtered": 0, "dropped": 0, "train": 10, "repeated": 0, "validation": 1}}
    assert [row["source"] for row in mixture.train] == ["a"] * 32 + ["b"] * 10  # 31.5 and 10.5: the tie goes to the first
    asked = [row["messages"][0]["content"] for row in mixture.train]
    first, second = asked[:7], asked[7:14]
    assert first == [f"a{i}" for i in range(7)] and sorted(second) == first != second
    assert max(Counter(asked[:32]).values()) == 5 and min(Counter(asked[:32]).values()) == 4
    assert [row["messages"][0]["content"] for row in mixture.validation] == ["a7", "a8", "a9", "b99"]
    assert mixture == read(data, num_rows=42, validation_rows=4) != read(data, num_rows=42, validation_rows=4, seed=1)


def test_validation_rows_come_from_each_file(tmp_path):
    numbered(tmp_path / "a, b.jsonl", 30, "a")
    numbered(tmp_path / "c.jsonl", 10, "c")
    mixture = read([{"data": str(tmp_path)}], num_rows=0, validation_rows=5)
    assert [row["messages"][0]["content"] for row in mixture.validation] == ["a26", "a27", "a28", "a29", "c9"]  # 3.75 and 1.25 of 5
    assert [row["messages"][0]["content"] for row in mixture.train] == [f"a{i}" for i in range(26)] + [f"c{i}" for i in range(9)]


def test_without_num_rows_each_source_counts_its_rows_times_its_weight(tmp_path, problems):
    a, b = numbered(tmp_path / "a.jsonl", 10, "a"), numbered(tmp_path / "b.jsonl", 30, "b")
    data = [{"data": a, "weight": 2}, {"data": b, "weight": 0.5}]
    mixture = read(data, num_rows=0)
    assert {name: (c["train"], c["repeated"]) for name, c in mixture.counts.items()} == {"a": (20, 10), "b": (15, 0)}
    assert [row["messages"][0]["content"] for row in mixture.train[20:]] != [f"b{i}" for i in range(15)]  # a seeded half, not the first
    counts = read([*data, {"data": "curriculum", "weight": 0.5}], problems=problems).counts
    assert counts["curriculum"]["train"] == 10  # half of (10 + 30) / 2
    with pytest.raises(ValueError, match="curriculum has no end: set num_rows above 0"):
        read([{"data": "curriculum"}], problems=problems)
    with pytest.raises(ValueError, match=r"a.jsonl has 10 rows that can be used \(0 dropped\), not more than the 10 validation rows"):
        read(data[:1], validation_rows=10)


def test_the_largest_remainder():
    assert apportion(10, [1, 1, 1]) == [4, 3, 3] and apportion(0, [1, 2]) == [0, 0]
    assert apportion(7, [0.7, 0.2, 0.1]) == [5, 1, 1]  # 4.9, 1.4, .7


def test_a_hub_dataset_is_read_no_further_than_needed(monkeypatch):
    asked = []

    def rows(*args, **kwargs):
        for i in itertools.count():
            asked.append(i)
            yield f"org/set, row {i}", {"prompt": f"q{i}", "completion": "a" if i != 2 else ""}

    monkeypatch.setattr(dialogues.corpora, "hub_rows", rows)
    mixture = read([{"data": "org/set"}], num_rows=6, validation_rows=2, bad_rows="drop")
    assert sorted(row["id"] for row in mixture.train) == [f"org/set, row {i}" for i in (0, 1, 3, 4, 5, 6)]
    assert [row["id"] for row in mixture.validation] == ["org/set, row 7", "org/set, row 8"]
    assert mixture.counts["org/set"]["read"] == 9 and max(asked) <= 9


def test_instructions_become_dialogues():
    mixture = read([{"data": "instructions"}], num_rows=3, validation_rows=1, seed=2)
    for rows, split in ((mixture.train, "sft"), (mixture.validation, "validation")):
        made = list(itertools.islice(instructions(2, split=split), len(rows)))
        assert [turns(row) for row in rows] == [[("user", m["prompt"]), ("assistant", m["answer"])] for m in made]
        assert [(row["id"], row["source"], row["first"]) for row in rows] == [(m["id"], "instructions", 1) for m in made]


@pytest.mark.parametrize(("given", "message"), [
    ([], "data: no source: give at least one, such as {data: curriculum}"),
    ([{"name": "x"}], "data[0]: data is required"),
    ([{"data": "curriculum", "wieght": 2}], "data[0]: unknown key 'wieght', did you mean 'weight'?"),
    ([{"data": "curriculum", "weight": "much"}], "data[0]: weight: got 'much' (str), expected float"),
    ([{"data": "curriculum", "weight": 0}], "data[0]: weight 0.0 must be above 0: leave the source out instead"),
    ([{"data": "curriculum", "worked_share": 1.5}], "data[0]: worked_share 1.5 must lie between 0 and 1"),
    ([{"data": "curriculum", "tasks": ["word_problem"]}], "data[0]: tasks: unknown task 'word_problem', did you mean 'word_problems'?"),
    ([{"data": "curriculum", "columns": {}}], "data[0]: columns has no meaning for curriculum: it takes data, name, weight, tasks"),
    ([{"data": "org/set", "tasks": []}], "data[0]: tasks has no meaning for org/set: it takes data, name, weight, format, columns"),
    ([{"data": "org/set", "format": "alpaca"}], "data[0]: format: got 'alpaca' (str), expected auto | prompt_completion | messages"),
    ([{"data": "org/set", "columns": {"promt": "q"}}], "data[0]: columns: unknown key 'promt', did you mean 'prompt'?"),
    ([{"data": "org/set", "format": "text", "columns": {"prompt": "q"}}], "data[0]: columns: unknown key 'prompt': choose from text"),
    ([{"data": "a/x.jsonl"}, {"data": "b/x.csv"}], "data[1]: a source named 'x' is there already: give one of them another name")])
def test_sources_that_cannot_be(given, message):
    with pytest.raises(ValueError) as error:
        parse_sources(given)
    assert str(error.value).startswith(message)


def test_names_of_sources():
    given = [{"data": data} for data in ("curriculum", "instructions", "d/a.jsonl.gz", "d/b.csv", "org/set", "d/*.json", "recipes")]
    assert [s.name for s in parse_sources(given)] == ["curriculum", "instructions", "a", "b", "org/set", "d/*.json", "recipes"]
    assert parse_sources([{"data": "org/set", "name": "n", "weight": 2}])[0] == Source(data="org/set", name="n", weight=2.0)


def test_rows_are_kept_by_their_columns_and_a_list_of_lines_is_one_turn(tmp_path):
    rows = [{"input": f"q{i}", "steps": [f"one {i}", "two"], "mistake_index": None if i % 2 else 0} for i in range(6)]
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"data": str(path), "columns": {"prompt": "input", "completion": "steps"}, "where": {"mistake_index": None}}
    mixture = read([source], validation_rows=1)
    assert [row["messages"][1]["content"] for row in mixture.train] == ["one 1\ntwo", "one 3\ntwo"]
    assert mixture.counts["steps"] == {"read": 6, "filtered": 3, "dropped": 0, "train": 2, "repeated": 0, "validation": 1}
    with pytest.raises(ValueError, match=r"no column 'mistake' for where: it has input, steps, mistake_index"):
        read([source | {"where": {"mistake": None}}])
    with pytest.raises(ValueError, match=r"steps.jsonl has no rows where {'mistake_index': 7}"):
        read([source | {"where": {"mistake_index": 7}}])
