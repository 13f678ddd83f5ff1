"""The user's problems: from the hub by configuration and split, and with the keys that may be missing."""
import json

import datasets
import pytest

from stages.data import corpora
from stages.data.problems import load_problems, read_problems, split_spec
from stages.evals.tasks import load_task


def test_specs():
    assert split_spec("gsm8k:openai/gsm8k") == ("gsm8k", "gsm8k", "openai/gsm8k")
    assert split_spec("mine=problems:/data/a=b.jsonl") == ("mine", "problems", "/data/a=b.jsonl")
    for spec in ("gsm8k", "word_problems", "a=b:c", "gsm8k/a.jsonl"):
        with pytest.raises(ValueError, match="is not format:source with a format of gsm8k, svamp, aqua, multiarith"):
            split_spec(spec)


@pytest.mark.parametrize(("spec", "asked"), [("gsm8k:openai/gsm8k", ("openai/gsm8k", "main")), ("problems:me/mine", ("me/mine", None))])
def test_hub_ids_are_loaded_by_configuration_and_split(monkeypatch, spec, asked):
    calls = []
    monkeypatch.setattr(corpora, "hub_revision", lambda source, repo_type: "abc123")
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **more: calls.append((*given, more)) or [
        {"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}])
    rows = load_problems(spec, hub_split="train")
    assert calls == [(*asked, {"split": "train", "streaming": False, "revision": "abc123"})]
    assert rows[0]["answer"] == "2" and rows[0]["task"] == spec.partition(":")[0]


def test_own_rows_may_lack_solutions(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": 2, "solutions": None}))
    assert load_problems(f"problems:{tmp_path / 'a.jsonl'}", hub_split="train")[0]["solutions"] == []


SYSTEM, USER, ASSISTANT = ({"role": role, "content": f"the {role} speaks"} for role in ("system", "user", "assistant"))


def written(path, row) -> str:
    path.write_text(json.dumps({"answer": 2} | row) + "\n")
    return f"problems:{path}"


@pytest.mark.parametrize("prompt", ["the user speaks", [USER], [SYSTEM, USER], [USER, ASSISTANT, USER]])
def test_a_prompt_is_a_text_or_messages(tmp_path, prompt):
    (row,) = load_problems(written(tmp_path / "a.jsonl", {"prompt": prompt}), hub_split="train")
    assert row["prompt"] == ([USER] if isinstance(prompt, str) else prompt) and row["question"] == "the user speaks"


@pytest.mark.parametrize(("row", "message"), [
    ({"prompt": [USER, ASSISTANT]}, "the prompt ends with a turn of the assistant: end it with the user's"),
    ({"prompt": [SYSTEM]}, "the prompt ends with a turn of the system"),
    ({"prompt": [{"role": "tool", "content": "x"}, USER]}, "message 1 of the prompt has the role 'tool': use system, user, assistant"),
    ({"prompt": []}, r"the prompt is \[\]: give a text, or a list of messages"), ({"prompt": 3}, "the prompt is 3: give a text"),
    ({"prompt": " "}, "message 1 of the prompt has the content ' ': give a text"),
    ({"prompt": [USER, SYSTEM, USER]}, "message 2 of the prompt is the system's: only the first can be"),
    ({"prompt": ["hello"]}, "message 1 of the prompt is 'hello': give an object with role and content"),
    ({"prompt": [USER | {"content": None}]}, "message 1 of the prompt has the content None"),
    ({"prompt": [USER], "question": "?"}, "it has a question and a prompt: keep one"), ({}, "no key 'question'")])
def test_a_prompt_that_nobody_can_answer_names_file_and_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"a\.jsonl.*1: {message}"):
        load_problems(written(tmp_path / "a.jsonl", row), hub_split="train")


def test_evaluation_refuses_conversations(tmp_path):
    with pytest.raises(ValueError, match=r"problem 'problems-0' of .* has a prompt of its own \(1 of 1 have one\)"):
        load_task(written(tmp_path / "a.jsonl", {"prompt": [USER]}), problems=tmp_path, difficulties=[1], num_problems=0, seed=0)


def test_problems_that_prepare_did_not_make_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"validation\.jsonl is not there: give prepare a number of validation problems in num_problems"):
        read_problems(tmp_path / "validation.jsonl")
