"""Preferences of other forms become records, and go back to TRL's."""
import json
from collections import Counter
from pathlib import Path

import pytest
from trl.data_utils import is_conversational, unpair_preference_dataset

from reward import preferences
from reward.converters import convert

HH_RLHF = Path(__file__).resolve().parents[2] / "shared" / "data" / "hh-rlhf" / "test.jsonl.gz"
TURN = [{"role": "user", "content": "q"}]


def answer(text):
    return [{"role": "assistant", "content": text}]


def collect(*rows):
    return preferences.collect(((f"row {n}", row) for n, row in enumerate(rows, start=1)), "x.jsonl")


def learned(records):
    """What is preferred to what, without who and how: the same before and after a conversion."""
    return sorted((json.dumps(r["prompt"]), r["responses"][i], r["responses"][j])
                  for r in records for i, j, _ in preferences.pairs(r["ranks"]))


@pytest.mark.parametrize(("row", "prompt"), [
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q"),
    ({"chosen": TURN + answer("a"), "rejected": TURN + answer("b")}, TURN),
    ({"prompt": TURN, "chosen": answer("a"), "rejected": answer("b")}, TURN),
    ({"prompt": "q", "chosen": answer("a"), "rejected": answer("b")}, "q"),
    ({"prompt": "q", "chosen": TURN + answer("a"), "rejected": TURN + answer("b")}, TURN),  # HuggingFaceH4/ultrafeedback_binarized
    ({"prompt": TURN, "chosen": TURN + answer("a"), "rejected": TURN + answer("b")}, TURN),
    ({"prompt": TURN, "chosen": answer("x") + TURN + answer("a"), "rejected": answer("x") + TURN + answer("b")},
     TURN + answer("x") + TURN)])
def test_pairs_as_text_and_messages_with_the_prompt_inside_or_beside(row, prompt):
    (record,), counted = collect(row)
    assert record == {"id": "x.jsonl:1", "prompt": prompt, "responses": ["a", "b"], "ranks": [1, 2], "annotator": "unknown",
                      "criterion": "overall"} and not counted


def test_pairs_keep_who_ranked_and_count_what_is_left_out():
    named = {"prompt": "q", "chosen": "a", "rejected": "b", "annotator": "simulated: judge", "criterion": "tone"}
    records, counted = collect(named, {**named, "rejected": " "}, {"chosen": TURN + answer("a"), "rejected": answer("b")})
    assert [(r["annotator"], r["simulated"], r["criterion"]) for r in records] == [("simulated: judge", True, "tone")]
    assert counted == {"empty_text": 1, "prompts_differ": 1}
    with pytest.raises(ValueError, match=r"x\.jsonl has no preferences; empty_text: 1"):
        collect({**named, "rejected": ""})


def rated(*ratings):
    aspects = ("helpfulness", "honesty", "truthfulness")
    return {aspect: {"Rating": rating, "Rationale": "..."} for aspect, rating in zip(aspects, ratings, strict=False)}


def test_ultrafeedback_is_ranked_by_its_scores_and_names_the_one_taken():
    completions = [{"model": "m1", "response": "a", "overall_score": 6.0, "fine-grained_score": 4.5},
                   {"model": "m2", "response": "b", "overall_score": 8.5},
                   {"model": "m3", "response": "c", "overall_score": 6.0}, {"model": "m4", "response": "d", "overall_score": None}]
    (record,), counted = collect({"source": "s", "instruction": "q", "completions": completions})
    assert (record["prompt"], record["responses"], record["ranks"]) == ("q", ["a", "b", "c"], [2, 1, 2])
    assert record["criterion"] == "overall_score" and record["origins"] == [{"model": "m1"}, {"model": "m2"}, {"model": "m3"}]
    assert record["annotator"] == "unknown" and record["scores"] == [6.0, 8.5, 6.0] and counted == {"unscored_responses": 1}
    fine = [{"response": r, "fine-grained_score": s} for r, s in (("a", "3.5"), ("b", 4))]
    assert collect({"prompt": TURN, "completions": fine})[0][0]["ranks"] == [2, 1]
    aspects = [{"response": "a", "annotations": rated("5", "N/A", "4")}, {"response": "b", "annotations": rated("5", "5", "3")},
               {"response": "c", "annotations": rated("N/A")}]
    (record,), counted = collect({"instruction": "q", "completions": aspects})
    assert (record["responses"], record["ranks"], record["criterion"]) == (["a", "b"], [1, 2], "mean of the annotations")
    assert counted == {"unscored_responses": 1}


def test_lists_with_scores_and_lists_best_first():
    records, counted = collect({"prompt": "q", "responses": ["a", "b", "c"], "scores": [0.5, 2, 0.5]},
                               {"prompt": TURN, "ranked": ["a", "b", "c"]})
    assert [r["ranks"] for r in records] == [[2, 1, 2], [1, 2, 3]] and [r["prompt"] for r in records] == ["q", TURN] and not counted
    with pytest.raises(ValueError, match="row 1: no 'ranks'"):  # the order of a list says nothing: nobody may have ranked it
        collect({"prompt": "q", "responses": ["b", "a"]})


@pytest.mark.parametrize(("row", "message"), [
    ({"prompt": "q", "responses": ["a", "b"], "scores": [1]}, r"row 1: 2 responses and scores \[1\]"),
    ({"instruction": "q", "completions": ["a", "b"]}, "row 1: completions must be a list of objects with a response"),
    ({"prompt": "q", "ranked": ["a"]}, "row 1: 1 responses and 1 ranks"), ({"ranked": ["a", "b"]}, "row 1: no 'prompt'"),
    ({"chosen": TURN, "rejected": [{"role": "user"}]}, r"row 1: chosen and rejected are texts or lists of messages .*, got .*user"),
    ({"chosen": 3, "rejected": 4}, "row 1: chosen and rejected are texts or lists of messages"),
    ({"prompt": "q", "ranked": "ab"}, "row 1: ranked is a str"),
    ({"prompt": "q", "responses": 2, "scores": [1]}, "row 1: responses is a int"),
    ({"prompt": "q", "chosen": "a", "rejected": 3}, "row 1: responses must be texts")])
def test_rows_that_are_not_what_their_columns_promise_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        collect(row)


def test_too_few_scores_are_counted_and_records_pass_as_they_are():
    counted = Counter()
    assert convert({"prompt": "q", "responses": ["a", "b"], "scores": [1, None]}, "here", counted) is None
    assert +counted == {"unscored_responses": 1, "too_few_scored": 1}
    record = {"prompt": "q", "responses": ["a", "b"], "ranks": [2, 1], "scores": [1.0, 2.0], "comment": None}
    assert convert(record, "here", counted) == {k: v for k, v in record.items() if v is not None}


@pytest.mark.parametrize("prompt", ["q", TURN])
@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_rankings_go_to_trl_and_back(tmp_path, prompt, name):
    records, _ = collect({"id": "a", "prompt": prompt, "responses": ["best", "tie", "other tie", "worst"], "ranks": [1, 2, 2, 4],
                          "annotator": "ann", "simulated": False, "criterion": "tone"},
                         {"id": "b", "prompt": prompt, "responses": ["x", "y"], "ranks": [1, 1]})
    rows = preferences.trl_pairs([*records, {"id": "s", "prompt": prompt, "responses": ["x", "y"], "skipped": "late"}])
    assert [row["id"] for row in rows] == ["a/0>1", "a/0>2", "a/0>3", "a/1>3", "a/2>3"]  # ties and skipped ones give no pair
    assert all(is_conversational(row) == (prompt is TURN) for row in rows)
    preferences.write(tmp_path / name, rows)
    back, counted = preferences.read(tmp_path / name)
    assert learned(back) == learned(records) and not counted and {r["annotator"] for r in back} == {"ann"}
    assert preferences.trl_pairs(back)[0].keys() == rows[0].keys()


def test_trl_takes_the_pairs():
    import datasets
    records, _ = collect({"prompt": TURN, "ranked": ["a", "b", "c"]})
    flat = unpair_preference_dataset(datasets.Dataset.from_list(preferences.trl_pairs(records)))
    assert sorted((row["completion"][0]["content"], row["label"]) for row in flat) == [
        ("a", True), ("a", True), ("b", False), ("b", True), ("c", False), ("c", False)]


@pytest.mark.skipif(not HH_RLHF.is_file(), reason="needs ../shared/data/hh-rlhf")
def test_hh_rlhf_keeps_its_preferences_through_trl(tmp_path):
    records, counted = preferences.read(HH_RLHF)
    assert len(records) + counted["prompts_differ"] + counted["empty_text"] == 2312 and counted == {"prompts_differ": 5, "empty_text": 4}
    preferences.write(tmp_path / "pairs.parquet", preferences.trl_pairs(records))
    assert learned(preferences.read(tmp_path / "pairs.parquet")[0]) == learned(records)
