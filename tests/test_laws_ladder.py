"""The scaling stage on a real, very small ladder: what it writes, resuming, reuse, bad input."""
import dataclasses
import json
import re
import sys
from types import SimpleNamespace

import pytest

from stages import pretrain, scaling
from stages.laws.fit import fit_law, predict
from stages.laws.points import read_columns
from stages.models import ladder as ladder_module
from stages.models import pretraining
from stages.models.counts import build_meta, planned_decoder
from stages.run.config import build_config
from stages.run.manifest import Manifest

PRETRAIN = """
hidden_size: 40
num_layers: 1
num_heads: 2
tokens: 8192
batch_tokens: 256
evaluations: 1
eval_rows: 4
checkpoints: 1
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    from stages import prepare

    folder = tmp_path_factory.mktemp("prepared") / "prepare"
    counts = {"sft": 4, "preferences": 4, "ppo": 4, "validation": 4, "test": 4}
    prepare.main(build_config(prepare.PrepareConfig, {
        "run_dir": str(folder), "num_documents": 300, "num_easy_documents": 60, "row_length": 128, "vocab_size": 320,
        "num_problems": counts}))
    (folder.parent / "pretrain.yaml").write_text(PRETRAIN)
    return folder


def config_for(prepared, run_dir, **changes):
    return build_config(scaling.ScalingConfig, {
        "run_dir": str(run_dir), "parents": {"prepare": str(prepared)}, "pretrain_config": str(prepared.parent / "pretrain.yaml"),
        "sizes": [{"hidden_size": 16}, {"hidden_size": 24}, {"hidden_size": 32}], "tokens": [1024, 2048, 4096],
        "bootstrap_draws": 20, **changes}, recipe="test")


@pytest.fixture(scope="module")
def ladder(prepared, tmp_path_factory):
    return scaling.main(config_for(prepared, tmp_path_factory.mktemp("ladder") / "scaling"))


def test_ladder_writes_runs_fit_and_prediction(ladder):
    runs = sorted(path.parent.name for path in ladder.path.glob("*/manifest.json"))
    assert runs == sorted(f"d{size}-{tokens}" for size in (16, 24, 32) for tokens in (1024, 2048, 4096))
    points = read_columns(ladder.product("points"), {"N": "N", "D": "D", "loss": "loss", "flops": "flops"})
    assert len(points["N"]) == 9
    for row in ladder.product("points").read_text().splitlines():
        point = json.loads(row)
        one = Manifest(ladder.path / point["run"])
        assert point["loss"] == one.metrics["heldout_loss"]["value"]
        assert (point["N"], point["D"]) == (one.counts["matmul_parameters"], one.counts["tokens"])
    fit = json.loads(ladder.product("fit").read_text())
    again = fit_law(points["N"], points["D"], points["loss"], num_draws=0)
    assert again["objective"] == pytest.approx(fit["objective"], rel=1e-6, abs=1e-12)
    assert fit["conventions"]["N"].startswith("matmul") and fit["projection"]["excess"] < 1e-6
    per_unit = points["flops"] / (points["N"] * points["D"])
    assert min(per_unit) <= fit["conventions"]["flops_per_unit"] <= max(per_unit) != 6  # the exact count, with attention
    assert fit["coverage"]["nominal"] == 0.95
    prediction = json.loads(ladder.product("prediction").read_text())
    assert prediction["D"] == 8192
    assert prediction["value"] == predict(fit, prediction["N"], prediction["D"])[0]
    assert prediction["interval"][0] <= prediction["value"] <= prediction["interval"][1]
    assert ladder.metrics["predicted_loss"]["value"] == prediction["value"]
    assert prediction["beyond"]["flops"] == pytest.approx(prediction["flops"] / max(points["flops"]))
    assert prediction["warnings"] == fit["warnings"]
    assert {path.stem for path in (ladder.path / "figures").iterdir()} == {
        "law-tokens", "law-parameters", "law-check", "law-residuals", "law-isoflop", "ladder-compute"}
    curves = json.loads(ladder.product("curves").read_text())
    assert curves["envelope"][0]["loss"] == pytest.approx(points["loss"][points["flops"].argmin()])


def test_finished_ladder_does_nothing(ladder, prepared, monkeypatch, capsys):
    monkeypatch.setattr(ladder_module, "pretrain", lambda *_: pytest.fail("trained again"))
    again = scaling.main(config_for(prepared, ladder.path))
    assert again.fingerprint == ladder.fingerprint
    assert "is finished" in capsys.readouterr().out


def test_interrupted_ladder_keeps_finished_runs_and_ends_equal(ladder, prepared, tmp_path, monkeypatch):
    started = []

    def stop_at_fourth(config, **kwargs):
        started.append(config)
        if len(started) == 4:
            raise KeyboardInterrupt
        return original(config, **kwargs)

    original = pretraining.pretrain
    monkeypatch.setattr(ladder_module, "pretrain", stop_at_fourth)
    config = config_for(prepared, tmp_path / "scaling")
    with pytest.raises(KeyboardInterrupt):
        scaling.main(config)
    assert not (tmp_path / "scaling").exists()
    kept = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "scaling.partial").glob("*/manifest.json")}
    assert len(kept) == 3
    monkeypatch.setattr(ladder_module, "pretrain", original)
    resumed = scaling.main(config)
    for name, modified in kept.items():
        assert (resumed.path / name / "manifest.json").stat().st_mtime_ns == modified
    assert resumed.metrics == ladder.metrics


def test_longer_ladder_reuses_the_shorter_one(ladder, prepared, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(ladder.path, tmp_path / "scaling")
    trained = []
    original = pretraining.pretrain

    def watched(config, **kwargs):
        trained.append((config.hidden_size, config.tokens))
        return original(config, **kwargs)

    monkeypatch.setattr(ladder_module, "pretrain", watched)
    before = {path.parent.name: Manifest(path.parent).data["provenance"]["started"] for path in ladder.path.glob("*/manifest.json")}
    longer = scaling.main(config_for(prepared, tmp_path / "scaling", tokens=[1024, 2048, 4096, 512]))
    assert trained == [(16, 512), (24, 512), (32, 512)]
    assert {name: Manifest(longer.path / name).data["provenance"]["started"] for name in before} == before and longer.counts["runs"] == 12


BRANCHES = PRETRAIN + "schedule: wsd\nwarmup_tokens: 512\neasy_tokens: 512\n"


@pytest.fixture(scope="module")
def branching(prepared):
    """The ladder's settings with budgets that branch off one run a size."""
    path = prepared.parent / "wsd.yaml"
    path.write_text(BRANCHES)
    return {"pretrain_config": str(path), "tokens": [2560, 5120, 10240]}


@pytest.fixture(scope="module")
def branched(prepared, branching, tmp_path_factory):
    return scaling.main(config_for(prepared, tmp_path_factory.mktemp("branched") / "scaling", **branching))


def test_budgets_branch_off_one_run_a_size(branched):
    runs = {path.parent.name: Manifest(path.parent) for path in branched.path.glob("*/manifest.json")}
    assert set(runs) == {f"d{size}-{end}" for size in (16, 24, 32) for end in (2560, 5120, 10240, "stable")}
    for size in (16, 24, 32):
        assert runs[f"d{size}-stable"].counts["tokens"] == 8192  # four fifths of the largest budget
        assert [runs[f"d{size}-{end}"].counts["branched_step"] * 256 for end in (2560, 5120, 10240)] == [2048, 4096, 8192]
    points = [json.loads(line) for line in branched.product("points").read_text().splitlines()]
    assert {p["run"] for p in points} == {name for name in runs if "stable" not in name}  # no run whose rate never fell
    for p in points:  # the path to a point, all of it
        assert p["D"] == int(p["run"].rpartition("-")[2]) and p["flops"] == runs[p["run"]].counts["flops"]
    a_token = {name: run.counts["flops"] / run.counts["tokens"] for name, run in runs.items()}
    once = sum(a_token[f"d{size}-stable"] * (8192 + 512 + 1024 + 2048) for size in (16, 24, 32))
    assert branched.counts["flops"] == pytest.approx(once) and branched.counts["tokens"] == 3 * (8192 + 512 + 1024 + 2048)
    assert branched.counts["flops_unshared"] == pytest.approx(sum(p["flops"] for p in points))
    fit = json.loads(branched.product("fit").read_text())
    assert fit["num_runs"] == 3 < fit["num_points"] == 9
    assert fit["conventions"]["schedule"].startswith("wsd: one run a size at a constant rate, and off it a cooldown over the last 20%")


def test_a_killed_ladder_of_branches_trains_nothing_twice(branched, prepared, branching, tmp_path, monkeypatch):
    trained, dies = [], []
    original = pretraining.PretrainTrainer.training_step

    def watched(self, *args, **kwargs):
        run = self.run_config
        if dies == [run.hidden_size, run.tokens, self.state.global_step]:
            raise KeyboardInterrupt
        trained.append((run.hidden_size, run.tokens, run.cooldown_share, self.state.global_step))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(pretraining.PretrainTrainer, "training_step", watched)
    config = config_for(prepared, tmp_path / "scaling", **branching)
    for moment in ([16, 8192, 16], [24, 5120, 16]):  # a stable run at a branching point; a branch before its first step
        dies[:] = moment
        with pytest.raises(KeyboardInterrupt):
            scaling.main(config)
    dies.clear()
    resumed = scaling.main(config)
    assert resumed.metrics == branched.metrics and resumed.counts == branched.counts
    assert len(trained) == len(set(trained)) == 3 * (8192 + 512 + 1024 + 2048) // 256


def test_another_budget_trains_only_what_is_new(branched, prepared, branching, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(branched.path, tmp_path / "scaling")
    trained = []
    original = pretraining.PretrainTrainer.training_step
    monkeypatch.setattr(pretraining.PretrainTrainer, "training_step", lambda self, *args, **kwargs: trained.append(
        (self.run_config.hidden_size, self.state.global_step)) or original(self, *args, **kwargs))
    budgets = [2560, 5120, 10240, 12800]
    scaling.main(config_for(prepared, tmp_path / "scaling", **branching | {"tokens": budgets}))
    for size in (16, 24, 32):
        assert [step for width, step in trained if width == size] == list(range(32, 50))  # the stable run goes on, then one cooldown
    trained.clear()
    scaling.main(config_for(prepared, tmp_path / "scaling", **branching | {"tokens": [*budgets, 7680]}))
    assert sorted(set(trained)) == [(size, step) for size in (16, 24, 32) for step in range(16, 30)]  # from the last checkpoint before


@pytest.mark.parametrize(("lines", "message"), [
    (PRETRAIN + "schedule: wsd\nwarmup_tokens: 512\n", "easy_tokens is not set, so that the beginning depends on tokens: set it to 614"),
    (BRANCHES + "cooldown_share: 0\n", "cooldown_share is 0, so that no rate ever falls")])
def test_budgets_that_cannot_begin_alike_are_refused(prepared, tmp_path, lines, message):
    (tmp_path / "pretrain.yaml").write_text(lines)
    with pytest.raises(ValueError, match=message):
        scaling.main(config_for(prepared, tmp_path / "scaling", pretrain_config=str(tmp_path / "pretrain.yaml")))


@pytest.mark.parametrize(("changes", "message"), [
    ({"sizes": [{"hidden_size": 16}]}, "1 sizes and 3 budgets"), ({"tokens": [512, 1024]}, "3 sizes and 2 budgets"),
    *(({"form": form}, f"form: {form} needs a known floor") for form in ("product", "mean")),
    ({"sizes": [{"hiden_size": 16}] * 3}, "unknown key 'hiden_size'"), ({"pretrain_config": "nowhere.yaml"}, "does not exist")])
def test_a_ladder_that_cannot_work_fails_before_training(prepared, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        scaling.main(config_for(prepared, tmp_path / "scaling", **changes))
    assert not (tmp_path / "scaling.partial").exists()


@pytest.mark.slow
def test_runs_that_train_at_once_are_those_that_train_in_turn(ladder, prepared, tmp_path, capsys, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *d24-2048*) echo "error: no such luck"; exit 2;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setattr(ladder_module.sys, "executable", str(python))
        with pytest.raises(ValueError, match="the ladder's run d24-2048 stopped: error: no such luck"):
            scaling.main(config_for(prepared, tmp_path / "scaling", jobs=2))
    told = capsys.readouterr().out
    assert told.index("ladder 1/9: d32-4096") < told.index("ladder 2/9: d24-4096") < re.search(r"ETA of the ladder \d", told).start()
    partial = tmp_path / "scaling.partial"
    done = {path.parent.name: path.stat().st_mtime_ns for path in partial.glob("d*/manifest.json")}
    assert "d32-4096" in done and "step 16/16" in (partial / "logs" / "d32-4096.txt").read_text()

    together = scaling.main(config_for(prepared, tmp_path / "scaling", jobs=2))
    assert {name: (together.path / name / "manifest.json").stat().st_mtime_ns for name in done} == done
    mine, theirs = ([json.loads(line) for line in one.product("points").read_text().splitlines()] for one in (together, ladder))
    assert [p["run"] for p in mine] == [p["run"] for p in theirs] and together.fingerprint == ladder.fingerprint
    assert [p["loss"] for p in mine] == pytest.approx([p["loss"] for p in theirs], rel=1e-4)  # one thread and two do not sum alike
    monkeypatch.setattr(ladder_module, "subprocess", None)
    scaling.main(config_for(prepared, tmp_path / "scaling", jobs=2, holdout_fraction=0.3))  # another check: none trained again


def test_the_floor_of_generated_text_is_known(ladder, prepared, tmp_path):
    import shutil

    entropy = Manifest(prepared).metrics["text_entropy"]["value"]
    shutil.copytree(ladder.path, tmp_path / "scaling")
    known = scaling.main(config_for(prepared, tmp_path / "scaling", floor="text"))
    assert known.metrics["E"]["value"] == pytest.approx(entropy) and 0.1 < entropy < min(
        json.loads(line)["loss"] for line in known.product("points").read_text().splitlines())
    with pytest.raises(ValueError, match="floor: text needs heldout_loss"):
        scaling.main(config_for(prepared, tmp_path / "scaling", floor="text", loss="heldout_loss/worked"))


def test_missing_metric_names_those_there_are(ladder, prepared):
    config = dataclasses.replace(config_for(prepared, ladder.path), loss="heldout_loss/poem")
    with pytest.raises(ValueError, match=r"no metric 'heldout_loss/poem': set loss to one of heldout_loss"):
        scaling.point("d16-1024", Manifest(ladder.path / "d16-1024"), config)


def test_a_doubtful_prediction_is_told_with_its_result(monkeypatch, capsys):
    forecast = {"value": 1.5, "warnings": ["alpha = 0.02 lies at the bound"]}
    monkeypatch.setattr(pretrain, "read_forecast", lambda _: forecast)
    monkeypatch.setattr(pretrain, "pretrain", lambda config, forecast: SimpleNamespace(metrics={"heldout_loss": {"value": 1.0}}))
    pretrain.main(pretraining.PretrainConfig())
    assert capsys.readouterr().out.splitlines() == [
        "held-out loss 1.0000, predicted 1.5000 before training (+50.0%)",
        "warning: that prediction was not to be trusted: alpha = 0.02 lies at the bound"]


@pytest.mark.parametrize(("width", "expected"), [(None, 0.02), (64, 0.02), (16, 0.01)])
def test_muons_rate_falls_with_the_width(width, expected):
    trainer = object.__new__(pretraining.PretrainTrainer)
    trainer.run_config, trainer.args = pretraining.PretrainConfig(hidden_size=32, matrix_lr_width=width), SimpleNamespace(bf16=False)
    trainer.model, trainer.optimizer = build_meta(planned_decoder(trainer.run_config, vocabulary=32, row_length=16)), None
    assert trainer.create_optimizer().param_groups[0]["lr"] == expected
