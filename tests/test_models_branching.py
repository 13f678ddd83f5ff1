"""A cooldown that branches off another run is the run that trained on by itself; what may not branch off says why. So is a compiled run."""
import dataclasses
import json
import shutil

import pytest
from safetensors.torch import load_file

from stages.models import branching, pretraining
from stages.models.pretraining import PretrainConfig, PretrainTrainer, pretrain
from stages.plan import ladder_flops
from stages.run.checkpoint import read_metrics
from stages.run.config import build_config

SETTINGS = {"hidden_size": 16, "num_layers": 1, "num_heads": 1, "batch_tokens": 256, "evaluations": 2, "eval_rows": 4, "checkpoints": 1,
            "logs": 100, "schedule": "wsd", "warmup_tokens": 512, "easy_tokens": 1024}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    from stages import prepare

    folder = tmp_path_factory.mktemp("prepared") / "prepare"
    prepare.main(build_config(prepare.PrepareConfig, {
        "run_dir": str(folder), "num_documents": 300, "num_easy_documents": 60, "row_length": 128, "vocab_size": 320,
        "num_problems": {"sft": 4, "preferences": 4, "ppo": 4, "validation": 4, "test": 4}}))
    return folder


def config_for(prepared, run_dir, **changes):
    return build_config(PretrainConfig, {**SETTINGS, "run_dir": str(run_dir), "parents": {"prepare": str(prepared)}, **changes})


@pytest.fixture(scope="module")
def trunk(prepared, tmp_path_factory):
    """16 steps of constant rate, kept at 8 and at the end: where cooldowns of 10 and 20 steps begin."""
    folder = tmp_path_factory.mktemp("trunk") / "stable"
    return pretrain(config_for(prepared, folder, tokens=16 * 256, cooldown_share=0.0, keep_at=[8 * 256, 16 * 256]))


def watched(monkeypatch, dies_at=-1):
    """Steps that are trained from now on."""
    steps, original = [], PretrainTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == dies_at:
            raise KeyboardInterrupt
        steps.append(self.state.global_step)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "training_step", training_step)
    return steps


def test_schedules_by_hand():
    config = PretrainConfig(tokens=10 * 256, batch_tokens=256, schedule="wsd", cooldown_share=0.4, warmup_tokens=512)
    assert branching.cooldown_start(config) == 6
    assert branching.learning_rate_schedule(config) == {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 2,
                                                        "lr_scheduler_kwargs": {"num_decay_steps": 4, "decay_type": "1-sqrt"}}
    assert branching.learning_rate_schedule(PretrainConfig(tokens=100 * 1024)) == {"lr_scheduler_type": "linear", "warmup_steps": 2}
    with pytest.raises(ValueError, match=r"cooldown_share 0\.9 begins the cooldown at step 1 of 10, and the warmup takes 2"):
        branching.learning_rate_schedule(dataclasses.replace(config, cooldown_share=0.9))


def test_a_plan_counts_once_what_budgets_share():
    scaling = {"sizes": [{"hidden_size": width, "num_heads": 1} for width in (16, 32, 48)], "tokens": [100_352, 200_704, 401_408]}
    alone = {"hidden_size": 64, "tokens": 1_000_000, "batch_tokens": 1024}
    each = ladder_flops(PretrainConfig(**alone), scaling, 300, 128)
    shared = ladder_flops(PretrainConfig(**alone, schedule="wsd", warmup_tokens=2048, easy_tokens=0), scaling, 300, 128)
    steps = [98, 196, 392]
    cooled = [20, 39, 78]  # a fifth, to the nearest step
    assert shared / each == pytest.approx((392 - 78 + sum(cooled)) / sum(steps))


@pytest.mark.parametrize(("tokens", "start"), [(10 * 256, 8), (20 * 256, 16), (15 * 256, 8)])
def test_a_branch_is_the_run_that_trained_by_itself(prepared, trunk, tmp_path, tokens, start, monkeypatch, capsys):
    steps = watched(monkeypatch)
    branch = pretrain(config_for(prepared, tmp_path / "branch", tokens=tokens, branch_from=str(trunk.path)))
    assert steps == list(range(start, tokens // 256)) and branch.counts["branched_step"] == start
    loss, few = branch.metrics["heldout_loss"]["value"], branch.config["eval_rows"]
    said = capsys.readouterr().out
    assert f"held-out loss {loss:.4f} over {4 * few} rows, the run's measure; over the first {few} of them in the lines above" in said
    assert len([line for line in said.splitlines() if "held-out" in line]) == 1  # what the steps said comes once
    whole = pretrain(config_for(prepared, tmp_path / "whole", tokens=tokens))
    assert branch.metrics == whole.metrics and branch.data["products"] == whole.data["products"]  # the weights' hash among them
    assert branch.fingerprint == whole.fingerprint
    assert {**branch.counts, "branched_step": None} == {**whole.counts, "branched_step": None}  # the FLOPs of the path
    ours, theirs = (read_metrics(run.path / "metrics.jsonl") for run in (branch, whole))
    assert [row["step"] for row in ours] == sorted({row["step"] for row in ours}) and ours[0]["step"] == 1
    late = {row["step"]: row for row in theirs}
    assert all(row["train/learning_rate"] == late[row["step"]]["train/learning_rate"] for row in ours if "train/learning_rate" in row)
    assert [row["step"] for row in ours if "heldout/loss" in row and row["step"] > start] == [
        row["step"] for row in theirs if "heldout/loss" in row and row["step"] > start]


def test_a_killed_branch_goes_on_and_the_trunk_can_go(prepared, trunk, tmp_path, monkeypatch):
    config = config_for(prepared, tmp_path / "branch", tokens=20 * 256, branch_from=str(trunk.path), checkpoints=6)
    with monkeypatch.context() as patched:
        watched(patched, dies_at=18)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    steps = watched(monkeypatch)
    resumed = pretrain(config)
    assert steps == [18, 19] and resumed.counts["branched_step"] == 16
    whole = pretrain(config_for(prepared, tmp_path / "whole", tokens=20 * 256, checkpoints=6))
    assert resumed.metrics == whole.metrics


def test_what_others_branch_off_outlives_rotation_and_kills(prepared, tmp_path, monkeypatch):
    config = config_for(prepared, tmp_path / "stable", tokens=16 * 256, cooldown_share=0.0, keep_at=[8 * 256, 16 * 256], checkpoints=7)
    with monkeypatch.context() as patched:
        patched.setattr(pretraining, "keep", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))  # saved, and not yet kept
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    assert not (tmp_path / "stable.partial" / "kept").exists()
    found = pretrain(config)
    assert {p.name for p in (found.path / "kept").iterdir()} == {"checkpoint-8", "checkpoint-16"}
    assert {p.name for p in (found.path / "checkpoints").iterdir()} == {"checkpoint-14", "checkpoint-16"}  # Trainer's own two
    assert [p.name for p in branching.usable_checkpoints(
        config_for(prepared, tmp_path, tokens=10 * 256), found, found.data["parents"])] == ["checkpoint-8"]


def test_a_longer_trunk_goes_on_from_a_shorter_one(prepared, trunk, tmp_path):
    longer = pretrain(config_for(prepared, tmp_path / "longer", tokens=24 * 256, cooldown_share=0.0, branch_from=str(trunk.path)))
    assert longer.counts["branched_step"] == 16
    assert longer.metrics == pretrain(config_for(prepared, tmp_path / "whole", tokens=24 * 256, cooldown_share=0.0)).metrics


@pytest.mark.parametrize(("changes", "message"), [
    ({"schedule": "linear"}, "schedule is linear, whose rate depends on tokens"), ({"seed": 1}, "seed is 0 there and 1 here"),
    ({"easy_tokens": None}, "easy_tokens is not set, so that the beginning depends on tokens: set it to 384"),
    ({"matrix_lr": 0.01}, "matrix_lr is 0.02 there and 0.01 here"), ({"schedule": "wsd-linear"}, "is 'wsd' there and 'wsd-linear' here"),
    ({"tokens": 7 * 256}, "it kept no checkpoint up to step 6, where the rate begins to fall, but at 8, 16: train it with keep_at 1536")])
def test_what_begins_otherwise_does_not_branch_off(prepared, trunk, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(config_for(prepared, tmp_path / "branch", **{"tokens": 10 * 256, "branch_from": str(trunk.path), **changes}))


def test_other_tokens_do_not_branch_off(prepared, trunk, tmp_path):
    shutil.copytree(prepared, tmp_path / "prepare")
    manifest = json.loads((prepared / "manifest.json").read_text()) | {"fingerprint": "sha256:other"}
    manifest.pop("checksum")
    (tmp_path / "prepare" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="trained on other tokens"):
        pretrain(config_for(tmp_path / "prepare", tmp_path / "branch", tokens=10 * 256, branch_from=str(trunk.path)))


def test_another_precision_does_not_branch_off(prepared, trunk, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="trained with mixed_precision 'no', and this launch config has 'bf16'"):
        pretrain(config_for(prepared, tmp_path / "branch", tokens=10 * 256, branch_from=str(trunk.path)))


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run_and_resumes(prepared, trunk, tmp_path, monkeypatch):
    settings = {"tokens": 16 * 256, "cooldown_share": 0.0, "checkpoints": 3, "torch_compile": True}
    with monkeypatch.context() as patched:
        watched(patched, dies_at=10)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config_for(prepared, tmp_path / "compiled", **settings))
    steps = watched(monkeypatch)
    compiled = pretrain(config_for(prepared, tmp_path / "compiled", **settings))
    assert steps[0] == 8
    for key, value in trunk.metrics.items():
        assert compiled.metrics[key]["value"] == pytest.approx(value["value"], rel=1e-4)
    names = [set(load_file(run.product("model") / "model.safetensors")) for run in (compiled, trunk)]
    assert names[0] == names[1]  # not those of the compiled module
    with pytest.raises(ValueError, match="torch_compile with experts"):
        pretrain(config_for(prepared, tmp_path / "experts", **settings, architecture="olmoe", num_experts=4))
