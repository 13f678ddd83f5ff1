"""The user's problems: from the hub by configuration and split, and with the keys that may be missing."""
import json

import datasets
import pytest

from stages.data import corpora
from stages.data.problems import load_problems, split_spec


def test_specs():
    assert split_spec("gsm8k:openai/gsm8k") == ("gsm8k", "gsm8k", "openai/gsm8k")
    assert split_spec("mine=problems:/data/a=b.jsonl") == ("mine", "problems", "/data/a=b.jsonl")
    for spec in ("gsm8k", "word_problems", "a=b:c", "gsm8k/a.jsonl"):
        with pytest.raises(ValueError, match="is not format:source with a format of gsm8k, svamp, aqua, problems"):
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
