"""TRL's formats out and in again: what a stage learns from comes back as the same rows."""
import json

import datasets
import pytest
from trl.data_utils import is_conversational

from reward import preferences
from stages import export
from stages.data import dialogues
from stages.data.corpora import read_rows
from stages.rl import trl_datasets
from stages.rl.questions import QuestionConfig, own_problems
from stages.run.manifest import Manifest


def finished(folder, name, products=(), **more):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"stage": name, "fingerprint": f"sha256:{name}", "notes": {}, "config": {},
                                                      "products": {product: {"path": product} for product in products}, **more}))
    return Manifest(folder)


@pytest.fixture
def prepare(stage, tmp_path):
    stage()
    problems = tmp_path / "prepare" / "problems"
    rows = (problems / "sft.jsonl").read_text().splitlines(keepends=True)
    for split, part in (("validation", rows[:20]), ("ppo", rows[20:60])):
        (problems / f"{split}.jsonl").write_text("".join(part))
    return Manifest(tmp_path / "prepare")


@pytest.fixture
def sft(prepare, tmp_path):
    dialogue = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    rows = [{"messages": [{"role": "system", "content": "Be brief."}, *dialogue]}, *({"messages": dialogue} for _ in range(3))]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"Line {i}."}) + "\n" for i in range(4)))
    settings = {"sources": [{"data": "curriculum"}, {"data": str(tmp_path / "talk.jsonl")}, {"data": str(tmp_path / "text.jsonl")}],
                "seed": 4, "num_rows": 9, "validation_rows": 3, "bad_rows": "stop"}
    mixture = dialogues.read(dialogues.parse_sources(settings["sources"]), problems=prepare.product("problems"), seed=4, num_rows=9,
                             validation_rows=3)
    return finished(tmp_path / "sft", "sft", ["model"], config=settings, notes={"sources": mixture.counts}), mixture


def test_dialogues_come_back_with_the_same_turns_to_learn(sft, prepare, tmp_path):
    manifest, mixture = sft
    counts = trl_datasets.write_datasets({"sft": manifest, "prepare": prepare}, tmp_path / "out")
    assert counts == {"sft-train.jsonl": 6, "sft-validation.jsonl": 2, "sft-text.jsonl": 4}
    for name, rows in (("sft-train", mixture.train), ("sft-validation", mixture.validation)):
        back = dialogues.read(dialogues.parse_sources([{"data": str(tmp_path / "out" / f"{name}.jsonl")}]), problems=None, seed=0,
                              num_rows=0, validation_rows=0).train
        spoken = [row for row in rows if "messages" in row]
        assert [row["messages"] for row in back] == [row["messages"] for row in spoken]
        learned = [[m["content"] for m in row["messages"][row["first"]:] if m["role"] == "assistant"] for row in back]
        assert learned == [[m["content"] for m in row["messages"][row["first"]:] if m["role"] == "assistant"] for row in spoken]
        assert all(is_conversational(row) for row in datasets.load_dataset(
            "json", data_files=str(tmp_path / "out" / f"{name}.jsonl"), split="train", cache_dir=str(tmp_path / "cache")))
    texts = [row["text"] for _, row in read_rows(tmp_path / "out" / "sft-text.jsonl")]
    assert sorted(texts) == sorted(row["text"] for row in [*mixture.train, *mixture.validation] if "text" in row)


def test_sources_that_have_changed_are_refused(sft, prepare, tmp_path):
    with (tmp_path / "talk.jsonl").open("a") as f:
        f.write(json.dumps({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}) + "\n")
    with pytest.raises(ValueError, match="now give other rows than the run read"):
        trl_datasets.write_datasets({"sft": sft[0], "prepare": prepare}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prompt", ["What is 2 + 3?", [{"role": "user", "content": "What is 2 + 3?"}]])
def test_rankings_come_back_as_the_same_pairs(prompt, tmp_path):
    record = {"id": "a", "prompt": prompt, "responses": ["five", "six", "5", "seven"], "ranks": [1, 3, 1, 3], "annotator": "ann",
              "simulated": False, "criterion": "overall"}
    run = finished(tmp_path / "preferences", "preferences", ["preferences.parquet"])
    run.data["products"] = {"preferences": {"path": "preferences.parquet"}}
    preferences.write(tmp_path / "preferences" / "preferences.parquet", [record, {**record, "id": "b", "ranks": [1, 1, 1, 1]}])
    assert trl_datasets.write_datasets({"preferences": run}, tmp_path / "out") == {"preference.jsonl": 4}
    file = tmp_path / "out" / "preference.jsonl"
    back, left_out = preferences.read(file)
    assert not +left_out and {(r["prompt"] == prompt, *r["responses"], *r["ranks"]) for r in back} == {
        (True, better, worse, 1, 2) for better in ("five", "5") for worse in ("six", "seven")}
    assert {r["annotator"] for r in back} == {"ann"} and not any(r["simulated"] for r in back)
    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert {"prompt", "chosen", "rejected"} <= set(rows.column_names) and is_conversational(rows[0]) == isinstance(prompt, list)


def test_prompts_come_back_with_answers_and_steps(prepare, tmp_path):
    config = {"tasks": [], "difficulties": [], "eval_problems": 15, "style": "worked", "problems": None, "gate": "warn"}
    ppo = finished(tmp_path / "ppo", "ppo", ["model"], config=config | {"iterations": 3})
    assert trl_datasets.write_datasets({"ppo": ppo, "prepare": prepare}, tmp_path / "out") == {"prompts.jsonl": 55}
    rows = [row for _, row in read_rows(tmp_path / "out" / "prompts.jsonl")]
    assert all(is_conversational(row) and row["prompt"][-1]["role"] == "user" for row in rows)
    learned, measured = own_problems(QuestionConfig(problems=f"problems:{tmp_path / 'out' / 'prompts.jsonl'}", eval_problems=15))
    assert len(measured) == 15 and len(learned) <= 40
    by_prompt = {json.dumps(row["prompt"]): row for row in rows}
    for row in [*learned, *measured]:
        kept = by_prompt[json.dumps(row["prompt"])]
        assert (row["answer"], row["id"], row.get("answer_type"), row["solutions"]) == (
            kept["answer"], kept["id"], kept.get("answer_type"), kept["solutions"]) and row["solutions"]
    assert [row["prompt"] for row in measured] == [row["prompt"] for row in rows[-15:]]


def test_the_command_writes_what_there_is_and_overwrites_nothing(sft, prepare, tmp_path, capsys):
    config = export.ExportConfig(recipe="r", run_dir=str(tmp_path / "export"), datasets=True, parents={
        name: str(tmp_path / name) for name in ("prepare", "sft", "preferences")})
    export.main(config)
    assert "sft-train.jsonl: 6 rows" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is there already"):
        export.main(config)
    with pytest.raises(ValueError, match="no finished run of sft, preferences or ppo"):
        trl_datasets.write_datasets({"prepare": prepare}, tmp_path / "none")
