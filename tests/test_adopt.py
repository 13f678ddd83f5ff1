"""Models trained elsewhere in a stage's place: later stages go on from them, and what would trip them is refused."""
import json
import shutil

import pytest

from stages import adopt
from stages.run.manifest import Manifest


@pytest.fixture
def elsewhere(model_folder, tmp_path):
    """A copy of the random model, as another program might leave it, and a prepare run with its tokenizer."""
    shutil.copytree(model_folder, tmp_path / "elsewhere")
    shutil.copytree(model_folder, tmp_path / "runs" / "prepare" / "tokenizer", ignore=shutil.ignore_patterns("model*", "config.json"))
    (tmp_path / "runs" / "prepare" / "manifest.json").write_text(json.dumps(
        {"stage": "prepare", "fingerprint": "sha256:prepare", "products": {"tokenizer": {"path": "tokenizer"}}}))
    return tmp_path / "elsewhere"


def config(tmp_path, stage="sft", **more):
    return adopt.AdoptConfig(recipe="r", stage=stage, model=str(tmp_path / "elsewhere"), run_dir=str(tmp_path / "runs" / "adopt"),
                             parents={"prepare": str(tmp_path / "runs" / "prepare")}, **more)


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_the_folder_becomes_a_finished_run(elsewhere, tmp_path, capsys):
    (elsewhere / "optimizer.pt").write_bytes(b"a pickle")
    (elsewhere / "evil.py").write_text("raise SystemExit")
    manifest = adopt.main(config(tmp_path))
    assert manifest.path == tmp_path / "runs" / "sft" and manifest.data["stage"] == "sft"
    assert manifest.data["parents"] == {"prepare": "sha256:prepare"}
    assert {p.name for p in manifest.product("model").iterdir()} == {p.name for p in elsewhere.iterdir()} - {"optimizer.pt", "evil.py"}
    assert manifest.metrics == {} and manifest.counts["parameters"] > 0
    adopt.main(config(tmp_path))
    assert "is finished and nothing it depends on has changed" in capsys.readouterr().out
    change(elsewhere / "config.json", eos_token_id=5)
    assert adopt.main(config(tmp_path)).fingerprint != manifest.fingerprint  # another model: the adopted one makes room


def test_a_stage_goes_on_from_it(elsewhere, stage, tmp_path):
    """An evaluation of the adopted model: the parents of `stage`, but for sft, are the made-up ones."""
    from stages import evaluation
    adopted = adopt.main(config(tmp_path))
    settings = stage(models={"sft": ["zero_shot_cot"]})
    done = evaluation.main(evaluation.EvaluationConfig(**vars(settings) | {"parents": settings.parents | {"sft": str(adopted.path)}}))
    assert done.data["parents"]["sft"] == adopted.fingerprint and done.metrics["sft/word_problems/zero_shot_cot"]["n"] == 7


def test_runs_trained_here_are_not_replaced(elsewhere, tmp_path):
    (tmp_path / "runs" / "sft").mkdir()
    (tmp_path / "runs" / "sft" / "manifest.json").write_text(json.dumps({"stage": "sft", "fingerprint": "x", "notes": {}}))
    with pytest.raises(ValueError, match="holds a run that was not adopted"):
        adopt.main(config(tmp_path))
    assert Manifest(tmp_path / "runs" / "sft").fingerprint == "x"


@pytest.mark.parametrize("spoil, message", [
    (lambda f: change(f / "config.json", architectures=["Qwen3ForSequenceClassification"]), "needs a language model"),
    (lambda f: change(f / "config.json", eos_token_id=None), "which token ends a response"),
    (lambda f: change(f / "tokenizer_config.json", pad_token=None), "no padding token"),
    (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
    (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    (lambda f: (f / "config.json").unlink(), "name the folder of a model"),
    (lambda f: change(f / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"}), "wants Python code of its own"),
    (lambda f: change(f / "tokenizer.json", added_tokens=json.loads((f / "tokenizer.json").read_text())["added_tokens"] + [
        {"id": 499, "content": "<|new|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}]),
     "the vocabulary of .* is not that of"),
])
def test_what_later_stages_would_stumble_over_is_refused(spoil, message, elsewhere, tmp_path):
    spoil(elsewhere)
    with pytest.raises(ValueError, match=message):
        adopt.main(config(tmp_path))
    assert not (tmp_path / "runs" / "sft").exists()
