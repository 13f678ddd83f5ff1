"""The picture of the pipeline: a box a stage, and verdicts that follow what the stage measured."""
import json
import shutil
from pathlib import Path

from stages.report import ReportConfig
from stages.run import page, story_pipeline
from stages.run.cited import Stage
from stages.run.manifest import MANIFEST, Manifest
from tests.report_runs import make_runs


def changed(home: Path, stage: str, *, metrics=None, notes=None, **more) -> page.Step:
    """The stage's box in the picture when its manifest says something else."""
    data = json.loads((home / stage / MANIFEST).read_text())
    data["metrics"] |= metrics or {}
    data["notes"] |= notes or {}
    manifest = Manifest(home / stage)
    manifest.data = data | more
    stages = {s: Stage(Manifest(home / s)) for s in ReportConfig.PARENTS if s != stage} | {stage: Stage(manifest)}
    return story_pipeline.step(stage, stages)


def test_the_pipeline_is_a_picture_with_verdicts(whole, told):
    steps = {step.key: step for step in told.steps}
    assert list(steps) == list(ReportConfig.PARENTS)
    assert {name: step.level for name, step in steps.items()} == {
        "prepare": "warn", "scaling": "pass", "pretrain": "pass", "sft": "warn", "preferences": "none", "reward_model": "warn",
        "rejection_sampling": "pass", "ppo": "warn", "evaluation": "warn"}
    assert page.plain(steps["ppo"].figure) == "gold score gained +0.210 [+0.190, +0.230], n 300"
    assert page.plain(steps["ppo"].why) == "above zero; 1 alarm of reward hacking: kl" and steps["ppo"].reads == (
        "prepare", "sft", "reward_model")
    assert "forgot: loss on the base corpus +0.550" in page.plain(steps["sft"].why)
    text = (whole / "report" / "index.html").read_text()
    for step in told.steps:
        assert f'<a href="#{step.key}">{step.key} (1m02s)</a><div class="verdict">{page.LEVELS[step.level]}</div>' in text
    assert all(len(words.split(" ", 1)) == 2 for words in page.LEVELS.values())  # a symbol and a word: no colour is needed


def test_each_verdict_follows_its_own_measure(whole):
    def level(*given, **more):
        return changed(whole, *given, **more).level

    def gained(low, high):
        return {"gain/gold": {"value": (low + high) / 2, "n": 9, "ci95": [low, high]}}

    assert [level("ppo", metrics=gained(*ends), notes={"alarms": []}) for ends in ((.1, .2), (-.1, .2), (-.2, -.1))] == [
        "pass", "warn", "fail"]
    assert level("ppo", metrics=gained(-.2, -.1)) == "fail"  # an alarm is no excuse
    assert level("ppo", metrics={"gain/gold": {"value": 0.1}}, notes={"alarms": []}) == "warn"  # without an interval nothing passes
    assert [level("pretrain", metrics={"heldout_loss": {"value": .4, "ci95": [.4, .4 + width]}}) for width in (0.0, .1)] == ["pass"] * 2
    assert level("sft", metrics={"change/base_loss": {"value": 0.0, "ci95": [-.1, .1]}}) == "pass"
    assert level("prepare", metrics={"contamination/gsm8k": {"value": 0.0, "n": 9}}) == "pass"
    assert level("prepare", notes={"contamination": {}}) == "none"
    alpha = [level("preferences", metrics={"agreement_alpha": {"value": low, "ci95": [low, high]}})
             for low, high in ((.8, .9), (.7, .9), (.5, .6), (.6, .7))]
    assert alpha == ["pass", "warn", "fail", "warn"]
    assert level("reward_model", metrics={"fresh_accuracy": {"value": .5, "n": 9, "ci95": [.4, .6]}}) == "fail"


def test_a_prediction_missed_fails_and_a_rise_of_held_out_loss_warns(tmp_path, shown):
    home = make_runs(tmp_path / "tiny", ("prepare", "scaling", "pretrain"))

    def level(stage):
        stages = {s: Stage(Manifest(home / s)) for s in ("prepare", "scaling", "pretrain")}
        return story_pipeline.step(stage, stages).level

    assert (level("scaling"), level("pretrain")) == ("pass", "pass")
    with (home / "pretrain" / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 11, "tokens": 2_100_000, "heldout/loss": 0.7}) + "\n")
    data = json.loads((home / "pretrain" / MANIFEST).read_text())
    data["metrics"]["heldout_loss"]["value"] = 0.7
    (home / "pretrain" / MANIFEST).write_text(json.dumps(data))
    assert (level("scaling"), level("pretrain")) == ("fail", "warn")
    data["counts"]["tokens"] = 1
    (home / "pretrain" / MANIFEST).write_text(json.dumps(data))
    assert level("scaling") == "none"  # another budget than the one predicted
    shutil.rmtree(home / "prepare")
    shutil.copytree(make_runs(tmp_path / "other", ("prepare",)) / "prepare", home / "prepare")
    data = json.loads((home / "prepare" / MANIFEST).read_text())
    (home / "prepare" / MANIFEST).write_text(json.dumps(data | {"fingerprint": "sha256:0"}))
    assert level("scaling") == "warn"  # made from another prepare
