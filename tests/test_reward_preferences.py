import gzip
import json

import pyarrow.parquet as pq
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
    by_hand = {"id": "c", "prompt": [{"role": "system", "content": "Bé brief."}, {"role": "user", "content": "q\u2028q"}],
               "responses": ["a", "b\r\n"], "ranks": [1, 1], "annotator": "ann", "simulated": False, "criterion": "tone",
               "order": [1, 0], "time": "2026-11-24T03:37:13Z", "seconds": 7.5, "comment": "",
               "origin": {"model": "sha256:1"}, "origins": [{"model": "x", "seed": None}, {"model": "y"}]}
    skipped = {"id": "d", "prompt": "q", "responses": ["a", "b"], "skipped": "cannot tell", "seconds": 3, "annotator": "ann",
               "more": [1, 2.5]}
    written = [record, {**record, "id": "b", "prompt": "again"}, by_hand, skipped]
    preferences.write(tmp_path / name, written)
    records, counted = preferences.read(tmp_path / name, skipped=True)
    assert not counted and records == written
    assert json.dumps(records, sort_keys=True) == json.dumps(written, sort_keys=True)  # 3 is no 3.0
    records, counted = preferences.read(tmp_path / name)
    assert counted == {"skipped": 1} and [r["id"] for r in records] == ["a", "b", "c"]
    one_type = [r for r in written if isinstance(r["prompt"], str) and "ranks" in r]
    preferences.write(tmp_path / name, one_type)
    assert preferences.read(tmp_path / name)[0] == one_type


def test_parquet_columns_of_one_type_are_plain_for_other_readers(tmp_path):
    rows = [{"id": str(i), **RECORD, "prompt": [{"role": "user", "content": "q"}], "origin": {"model": "m"}} for i in range(2)]
    rows.append({"id": "s", "prompt": rows[0]["prompt"], "responses": ["a", "b"], "skipped": "late"})
    preferences.write(tmp_path / "x.parquet", rows)
    first, _, last = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert first["prompt"] == rows[0]["prompt"] and first["ranks"] == [1, 2, 2] and first["origin"] == {"model": "m"}
    assert last["ranks"] is None
    preferences.write(tmp_path / "x.parquet", [*rows, {"id": "t", **RECORD}])
    assert json.loads(pq.read_table(tmp_path / "x.parquet").to_pylist()[3]["prompt"]) == RECORD["prompt"]


def test_hh_rlhf_dialogues_become_messages_and_two_responses(tmp_path):
    path = tmp_path / "test.jsonl.gz"
    other = {**HH, "rejected": HH["rejected"].replace("hi", "hey")}
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in (HH, other)).encode()))
    (record,), counted = preferences.read(path)
    assert counted == {"prompts_differ": 1}  # the second row's two dialogues do not answer one prompt
    assert record["prompt"] == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."},
                                {"role": "user", "content": "how?"}]
    assert record["responses"] == ["Well: fine.\n\nThanks!", "No."] and record["ranks"] == [1, 2] and record["simulated"] is False


@pytest.mark.parametrize(("row", "message"), [
    ("{not json", r"line 2 is not JSON"),
    ("[1, 2]", r"line 2 is a list"),
    ({**RECORD, "ranks": [1, 2]}, r"line 2: 3 responses and 2 ranks"),
    ({**RECORD, "ranks": [0, 1, 2]}, r"line 2: ranks \[0, 1, 2\]"),
    ({**RECORD, "ranks": [1.5, 1, 2]}, r"line 2: ranks"),
    ({**RECORD, "responses": ["a", 3, "b"]}, r"line 2: responses must be texts"),
    ({k: v for k, v in RECORD.items() if k != "ranks"}, r"line 2: no 'ranks'"),
    ({**RECORD, "ranks": [True, 2, 3]}, r"line 2: ranks \[True, 2, 3\]: expected whole numbers"),
    ({**RECORD, "ranks": [float("nan"), 1, 2]}, r"line 2: ranks \[nan, 1, 2\]: expected whole numbers"),
    ({**RECORD, "ranks": [1, 2, 3, 4]}, r"line 2: 3 responses and 4 ranks"),
    ({**RECORD, "ranks": 1}, r"line 2: 3 responses and 1 ranks"),
    ({**RECORD, "responses": ["a"], "ranks": [1]}, r"line 2: 1 responses and 1 ranks: give at least two"),
    ({**RECORD, "responses": "abc"}, r"line 2: responses is a str, expected a list of texts"),
    ({**RECORD, "responses": ["a", " \n", "b"]}, r"line 2: a response is empty text"),
    ({**RECORD, "prompt": " "}, r"line 2: the prompt is empty text"),
    ({**RECORD, "prompt": [{"role": "user"}]}, r"line 2: prompt is neither text nor a list"),
    ({**RECORD, "responses": ["a", "\ud83d", "b"]}, r"line 2: a text has half of a surrogate pair \('\\ud83d'\)"),
    ({**RECORD, "skipped": "late"}, r"line 2: skipped 'late' with ranks \[1, 2, 2\]"),
    ({"prompt": "q", "responses": ["a"], "skipped": "late"}, r"line 2: 1 responses: give at least two"),
    ({"prompt": "q", "responses": ["a", "b"], "skipped": ""}, r"line 2: no 'skipped'"),
    ({**RECORD, "order": [0, 1, 1]}, r"line 2: order \[0, 1, 1\]: expected the numbers 0 to 2"),
    ({**RECORD, "order": [0, 1]}, r"line 2: order \[0, 1\]"), ({**RECORD, "order": [0, True, 2]}, r"line 2: order"),
    ({**RECORD, "time": "yesterday"}, r"line 2: time 'yesterday': expected ISO 8601 in UTC"),
    ({**RECORD, "time": "2026-01-31T09:30:00"}, r"line 2: time"), ({**RECORD, "time": "2026-01-31T09:30:00+02:00"}, r"line 2: time"),
    ({**RECORD, "seconds": -1}, r"line 2: seconds -1"), ({**RECORD, "seconds": "7"}, r"line 2: seconds '7'"),
    ({**RECORD, "simulated": "no"}, r"line 2: simulated 'no': expected bool"), ({**RECORD, "annotator": 7}, r"line 2: annotator 7"),
    ({**RECORD, "origins": [{}]}, r"line 2: origins must be a list of 3"),
    ({**RECORD, "prompt_ids": [1]}, r"line 2: prompt_ids and response_ids belong together"),
    ({**RECORD, "prompt_ids": [1], "response_ids": [[1], [], [2]]}, r"line 2: response_ids"),
    ({"chosen": "Hello.", "rejected": "No."}, r"line 2: expected turns"),
    ({"chosen": "\n\nHuman: hi", "rejected": "\n\nHuman: hi"}, r"line 2: a dialogue does not end with the assistant")])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"bad\.jsonl, {message}"):
        preferences.read(lines(tmp_path / "bad.jsonl", [RECORD, row]))


def test_an_empty_response_is_one_if_its_token_ids_are_there(tmp_path):
    record = {**RECORD, "responses": ["", "a", "b"], "prompt_ids": [1], "response_ids": [[2], [3, 2], [4, 2]]}
    assert preferences.read(lines(tmp_path / "x.jsonl", [record]))[0][0]["responses"][0] == ""


def test_one_id_is_ranked_once_by_each_annotator_and_criterion(tmp_path):
    rows = [{"id": "a", **RECORD}, {"id": "a", **RECORD, "annotator": "eve"}, {"id": "a", **RECORD, "criterion": "tone"}, RECORD]
    assert len(preferences.read(lines(tmp_path / "x.jsonl", rows))[0]) == 4
    with pytest.raises(ValueError, match=r"x\.jsonl, line 5: id 'a' was ranked by 'people' already \(.*x\.jsonl, line 1\)"):
        preferences.read(lines(tmp_path / "x.jsonl", [*rows, {"id": "a", **RECORD, "ranks": [3, 2, 1]}]))


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
