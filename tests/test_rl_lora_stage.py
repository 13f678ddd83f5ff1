"""stages.ppo with method lora as users run it: products, the reward model on the same base, kill and resume."""
import json
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.ppo import PpoConfig, main
from stages.rl.adapters import HEAD
from stages.run.config import build_config
from tests.rl_tiny import write_lora_reward, write_parents
from tests.test_rl_stage import FLAGS, ROOT, command, manifest, run

LORA = {"method": "lora", "lora-rank": 4, "lora-alpha": 8, "value-trunk": "adapter", "learning-rate": 3e-3, "best-of": 0}


@pytest.fixture(scope="module")
def parents(tmp_path_factory) -> Path:
    """As for the other tests of the stage, the reward model trained by LoRA on the SFT model."""
    root = write_parents(tmp_path_factory.mktemp("runs"))
    bpe = AutoTokenizer.from_pretrained(root / "sft" / "model")
    shutil.rmtree(root / "reward_model" / "model")
    write_lora_reward(root / "sft" / "model", root / "reward_model", bpe.pad_token_id)
    bpe.save_pretrained(root / "reward_model" / "model")
    file = root / "reward_model" / "manifest.json"
    made = json.loads(file.read_text())
    made["products"]["adapter"] = {"path": "adapter", "sha256": ""}
    file.write_text(json.dumps(made))
    return root


def here(parents: Path, directory: Path, **values):
    flags = {name.replace("-", "_"): value for name, value in ({**FLAGS, **LORA, "iterations": 1} | values).items()}
    return main(build_config(PpoConfig, {**flags, "run_dir": str(directory), "parents": {
        p: str(parents / p) for p in ("prepare", "sft", "reward_model")}}, recipe="test"))


@pytest.fixture(scope="module")
def finished(parents, tmp_path_factory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("finished") / "ppo"
    result = run(command(parents, directory, **LORA))
    assert result.returncode == 0, result.stderr
    return directory, result.stdout


def test_the_product_is_merged_and_its_adapter_lies_beside_it(finished, parents):
    directory, output = finished
    assert "loaded whole" not in output
    start = AutoModelForCausalLM.from_pretrained(parents / "sft" / "model")
    product = AutoModelForCausalLM.from_pretrained(directory / "model")
    assert {name for name, _ in product.named_parameters()} == {name for name, _ in start.named_parameters()}
    assert torch.equal(product.lm_head.weight, start.lm_head.weight)
    ids = torch.tensor([[5, 6, 7, 8]])
    logits, before = product(ids).logits, start(ids).logits
    again = PeftModel.from_pretrained(start, directory / "adapter")(ids).logits
    torch.testing.assert_close(logits, again, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits, before, atol=1e-3)
    made = manifest(directory)
    assert set(made["products"]) == {"model", "critic", "overoptimization", "adapter"} and not (directory / "README.md").exists()
    assert made["metrics"]["before/kl"]["value"] == pytest.approx(0, abs=1e-6) and made["metrics"]["after/kl"]["value"] != 0
    assert {file.name for file in (directory / "critic").iterdir()} == {"adapter_config.json", "adapter_model.safetensors",
                                                                        "value_head.safetensors"} and HEAD == "score.weight"


def test_sharing_changes_no_figure(finished, parents, tmp_path):
    """With the reward model loaded whole, as one that has no adapter is, the first iteration's scores and values are the same."""
    for stage in ("prepare", "sft"):
        (tmp_path / stage).symlink_to(parents / stage)
    shutil.copytree(parents / "reward_model", tmp_path / "reward_model")
    file = tmp_path / "reward_model" / "manifest.json"
    made = json.loads(file.read_text())
    del made["products"]["adapter"]
    file.write_text(json.dumps(made))
    here(tmp_path, tmp_path / "ppo", **{"value-trunk": "separate", "iterations": 4})
    one, other = (json.loads((d / "metrics.jsonl").read_text().splitlines()[0]) for d in (finished[0], tmp_path / "ppo"))
    for key in ("objective/score", "value/explained_variance", "objective/entropy", "loss/policy", "score/q95"):
        assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_other_critics(parents, tmp_path, trunk):
    made = here(parents, tmp_path / "ppo", **{"value-trunk": trunk})
    assert (tmp_path / "ppo" / "critic" / ("value_head.safetensors" if trunk == "shared" else "model.safetensors")).is_file()
    assert made.metrics["after/kl"]["value"] != 0


def test_a_critic_without_a_base_to_share_is_refused(parents, tmp_path):
    with pytest.raises(ValueError, match="set method to lora, or value_trunk to separate"):
        here(parents, tmp_path / "ppo", method="full")


def test_frozen_matrices_cost_no_gradient(parents, tmp_path):
    flags = {"value-trunk": "shared", "reward": {"verifier": 1.0}}
    lora, full = (here(parents, tmp_path / method, method=method, **flags, **{"learning-rate": 0.0}) for method in ("lora", "full"))
    assert lora.data["counts"]["tokens"] == full.data["counts"]["tokens"]
    assert lora.data["counts"]["flops"] * 6 == full.data["counts"]["flops"] * 5  # sampled, old, reference, and two for three of learning


@pytest.mark.slow
def test_a_killed_lora_run_continues_to_the_same_result(finished, parents, tmp_path):
    line = command(parents, tmp_path / "ppo", **LORA)
    killed = run([sys.executable, str(ROOT / "tests" / "killer.py"), "step:6", *line[2:]])
    assert killed.returncode == -9, killed.stderr
    result = run(line)
    assert result.returncode == 0 and "resuming from" in result.stdout, result.stderr
    assert manifest(tmp_path / "ppo")["metrics"] == manifest(finished[0])["metrics"]
    for file in ("metrics.jsonl", "model/model.safetensors", "adapter/adapter_model.safetensors", "critic/adapter_model.safetensors",
                 "critic/value_head.safetensors"):
        assert (tmp_path / "ppo" / file).read_bytes() == (finished[0] / file).read_bytes(), file


@pytest.mark.slow
def test_a_rollback_loads_the_best_checkpoints_adapters(parents, tmp_path):
    here(parents, tmp_path / "ppo", iterations=8, **{"on-alarm": "rollback", "alarm-limits": {"kl": -9}, "sample-iterations": 0})
    notes = manifest(tmp_path / "ppo")["notes"]
    assert notes["kept_step"] == notes["best_step"] < notes["last_step"]
    saved = safetensors.torch.load_file(tmp_path / f"ppo/checkpoints/checkpoint-{notes['best_step']}/model.safetensors")
    product = safetensors.torch.load_file(tmp_path / "ppo/adapter/adapter_model.safetensors")
    for name, tensor in product.items():
        assert torch.equal(tensor, saved["policy." + name.removeprefix("base_model.model.").replace(".weight", ".default.weight")]), name
