"""The gate before PPO and rejection sampling: what is refused, what goes on, and what the notes say."""
import json
import shutil
from pathlib import Path

import pytest

from stages import ppo, rejection_sampling
from stages.rl.gating import pass_gate
from tests.rl_tiny import write_parents
from tests.test_rejection_sampling import configured as sampling
from tests.test_rl_stage import configured

BAD = {"fresh_accuracy": {"value": 0.5, "n": 100, "ci95": [0.4, 0.6]}}


@pytest.fixture(scope="module")
def unmeasured(tmp_path_factory) -> Path:
    return write_parents(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def parents(unmeasured, tmp_path_factory) -> Path:
    """Parents whose reward model is known to be at chance."""
    root = tmp_path_factory.mktemp("bad") / "runs"
    shutil.copytree(unmeasured, root)
    file = root / "reward_model" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"metrics": BAD}))
    return root


@pytest.mark.parametrize(("stage", "settings"), [(ppo, configured), (rejection_sampling, sampling)])
def test_a_bad_reward_model_is_refused_before_anything_is_loaded(parents, tmp_path, monkeypatch, capsys, stage, settings):
    monkeypatch.setattr(stage, "AutoTokenizer", None)
    config = settings(parents, tmp_path / "run")
    with pytest.raises(ValueError, match=r"is not good enough: fresh_accuracy is 0\.500 \[0\.400, 0\.600\], n 100: not >= 0\.85; train"):
        stage.main(config)
    assert not (tmp_path / "run").exists()
    printed = capsys.readouterr().out
    assert "verdict: fail" in printed and "heldout_accuracy" in printed and "[0.400, 0.600]" in printed


def test_told_otherwise_ppo_goes_on_and_its_notes_say_so(parents, tmp_path):
    made = ppo.main(configured(parents, tmp_path / "ppo", gate="warn", iterations=1))
    (note,) = made.data["notes"]["reward_model_gate"].values()
    assert note["verdict"] == "fail" and note["gate"] == "warn" and note["limits"]["min_fresh_accuracy"] == 0.85
    assert {r["name"]: r["level"] for r in note["reasons"]}["heldout_accuracy"] == "warn"
    again = ppo.main(configured(parents, tmp_path / "ppo", gate="off", iterations=1))
    assert again.fingerprint == made.fingerprint  # it changes no number


def test_what_is_not_measured_warns_and_is_not_refused(unmeasured, tmp_path, capsys):
    config = configured(unmeasured, tmp_path / "ppo")
    notes = pass_gate(config, unmeasured / "reward_model" / "model")
    assert [note["verdict"] for note in notes["reward_model_gate"].values()] == ["warn"]
    assert "verdict: warn" in capsys.readouterr().out
    lone = shutil.copytree(unmeasured / "reward_model" / "model", tmp_path / "alone" / "model")  # a model without a run around it
    assert pass_gate(configured(unmeasured, tmp_path / "ppo", reward=f"{{{lone}: 1.0}}"), None)["reward_model_gate"].keys() == {str(lone)}


def test_limits_can_be_set_and_no_model_has_no_gate(parents, tmp_path, capsys):
    folder = parents / "reward_model" / "model"
    lower = pass_gate(configured(parents, tmp_path / "ppo", gate_limits="{min_fresh_accuracy: 0.45}"), folder)
    assert [note["verdict"] for note in lower["reward_model_gate"].values()] == ["warn"]
    with pytest.raises(ValueError, match="did you mean 'min_fresh_accuracy'"):
        pass_gate(configured(parents, tmp_path / "ppo", gate_limits="{min_fresh_accurcy: 0.45}"), folder)
    capsys.readouterr()
    assert pass_gate(configured(parents, tmp_path / "ppo", gate="off"), folder) == {}
    assert pass_gate(configured(parents, tmp_path / "ppo", reward="{verifier: 1.0}"), folder) == {}
    assert capsys.readouterr().out == ""
