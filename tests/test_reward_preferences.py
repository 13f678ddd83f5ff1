import gzip
import json

import pytest

from reward import preferences

RECORD = {"prompt": "What is 2 + 2?", "responses": ["4", "5", "22"], "ranks": [1, 2, 2], "annotator": "people", "simulated": False}
HH = {"chosen": "\n\nHuman: hi\n\nAssistant: Hello.\n\nHuman: how?\n\nAssistant: Well: fine.\n\nThanks!", "rejected":
      "\n\nHuman: hi\n\nAssistant: Hello.\n\nHuman: how?\n\nAssistant: No."}


def lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_what_is_written_is_read_back(tmp_path, name):
    record = {"id": "a", **RECORD, "prompt_ids": [5, 6], "response_ids": [[1], [2, 3], [4]], "origin": {"model": "m", "temperature": 1.0}}
    preferences.write(tmp_path / name, [record, {**record, "id": "b", "prompt": "again"}])
    records, differing = preferences.read(tmp_path / name)
    assert differing == 0 and [r["id"] for r in records] == ["a", "b"]
    assert records[0] == record


def test_hh_rlhf_dialogues_become_messages_and_two_responses(tmp_path):
    path = tmp_path / "test.jsonl.gz"
    other = {**HH, "rejected": HH["rejected"].replace("hi", "hey")}
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in (HH, other)).encode()))
    (record,), differing = preferences.read(path)
    assert differing == 1  # the second row's two dialogues do not answer one prompt
    assert record["prompt"] == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."},
                                {"role": "user", "content": "how?"}]
    assert record["responses"] == ["Well: fine.\n\nThanks!", "No."] and record["ranks"] == [1, 2] and record["simulated"] is False


def test_chosen_and_rejected_as_messages_or_beside_a_prompt(tmp_path):
    turns = [{"role": "user", "content": "q"}]
    rows = [{"chosen": [*turns, {"role": "assistant", "content": "a"}], "rejected": [*turns, {"role": "assistant", "content": "b"}]},
            {"prompt": "q", "chosen": "a", "rejected": "b"}]
    records, _ = preferences.read(lines(tmp_path / "x.jsonl", rows))
    assert [r["prompt"] for r in records] == [turns, "q"] and all(r["responses"] == ["a", "b"] for r in records)


@pytest.mark.parametrize(("row", "message"), [
    ("{not json", r"line 2 is not JSON"),
    ("[1, 2]", r"line 2 is a list"),
    ({**RECORD, "ranks": [1, 2]}, r"line 2: 3 responses and 2 ranks"),
    ({**RECORD, "ranks": [0, 1, 2]}, r"line 2: ranks \[0, 1, 2\]"),
    ({**RECORD, "ranks": [1.5, 1, 2]}, r"line 2: ranks"),
    ({**RECORD, "responses": ["a", 3, "b"]}, r"line 2: responses must be texts"),
    ({k: v for k, v in RECORD.items() if k != "ranks"}, r"line 2: no 'ranks'"),
    ({**RECORD, "prompt_ids": [1]}, r"line 2: prompt_ids and response_ids belong together"),
    ({**RECORD, "prompt_ids": [1], "response_ids": [[1], [], [2]]}, r"line 2: response_ids"),
    ({"chosen": "Hello.", "rejected": "No."}, r"line 2: expected turns"),
    ({"chosen": "\n\nHuman: hi", "rejected": "\n\nHuman: hi"}, r"line 2: a dialogue does not end with the assistant")])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"bad\.jsonl, {message}"):
        preferences.read(lines(tmp_path / "bad.jsonl", [RECORD, row]))


def test_files_that_are_not_what_they_seem(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        preferences.read(tmp_path / "none.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 1 is not UTF-8"):
        preferences.read(tmp_path / "x.jsonl")
    (tmp_path / "x.parquet").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"x\.parquet is not parquet"):
        preferences.read(tmp_path / "x.parquet")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(RECORD).encode() * 1000)[:-20])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz"):
        preferences.read(tmp_path / "cut.jsonl.gz")
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    with pytest.raises(ValueError, match="not whole gzip"):
        preferences.read(tmp_path / "plain.jsonl.gz")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no preferences"):
        preferences.read(tmp_path / "empty.jsonl")


def test_pairs_leave_ties_out_and_count_distinct_ranks_as_distance():
    assert preferences.pairs([1, 1, 3, 4]) == [(0, 2, 1), (0, 3, 2), (1, 2, 1), (1, 3, 2), (2, 3, 1)]
    assert preferences.pairs([2, 1]) == [(1, 0, 1)] and preferences.pairs([1, 1]) == []


def test_encode_splits_an_answered_dialogue_where_the_answer_begins():
    def chat_ids(messages, ask):
        return [ord(c) for m in messages for c in m["role"][0] + m["content"]] + ([ord("a")] if ask else [])

    record = preferences.encode({"prompt": "q", "responses": ["xy", "z"], "ranks": [1, 2]}, chat_ids)
    assert record["prompt_ids"] == [ord(c) for c in "uqa"] and record["response_ids"] == [[ord("x"), ord("y")], [ord("z")]]
    sampled = {**RECORD, "prompt_ids": [1], "response_ids": [[2], [3], [4]]}
    assert preferences.encode(sampled, chat_ids) is sampled  # ids that are there are what is scored
    with pytest.raises(ValueError, match="prefix"):
        preferences.encode({"prompt": "q", "responses": ["x", "y"], "ranks": [1, 2]}, lambda messages, ask: [7] if ask else [8])
