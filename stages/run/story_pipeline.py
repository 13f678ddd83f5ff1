"""The pipeline as a picture: of each stage the one figure to look at, and what its own measures say of it.

A verdict passes, warns or fails by an interval that the stage measured; where nothing was measured that could fail, there is none.
"""
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from reward.gate import judge
from stages.run.checkpoint import read_metrics
from stages.run.cited import CHANGE, GAIN, LOSS, MODELS, SHARE, Form, Stage, Stages, verdict
from stages.run.console import clock
from stages.run.names import called
from stages.run.page import Step, number

RANK = ("none", "pass", "warn", "fail")
# Agreement below the first supports no conclusion; from the second on it is reliable (Krippendorff 2004, section 11.4).
ALPHA = (0.667, 0.8)


class Key(NamedTuple):
    """A figure of a manifest, its name and how it is written."""

    metric: str
    label: str
    form: Form


KEYS = {"prepare": [Key("kept_share", "documents kept", SHARE)],
        "scaling": [Key("predicted_loss", "predicted loss", LOSS)],
        "pretrain": [Key("heldout_loss", "held-out loss", LOSS)],
        "sft": [Key("after/worked_accuracy", "right, worked", SHARE), Key("after/stop_rate", "answers that end", SHARE),
                Key("validation_loss", "validation loss", LOSS)],
        "preferences": [Key("kept_share", "prompts with a ranking", SHARE)],
        "reward_model": [Key("fresh_accuracy", "fresh pairs ordered right", SHARE),
                         Key("heldout_accuracy", "held-out pairs ordered right", SHARE)],
        "rejection_sampling": [Key("gain/gold", "gold score gained", CHANGE)],
        "ppo": [Key("gain/gold", "gold score gained", CHANGE)]}
Said = tuple[str, str]  # level and why


def keys(s: Stage) -> list[Key]:
    """The figures to look at of a stage, the most telling that it has measured first."""
    if s.data["stage"] != "evaluation":
        return [key for key in KEYS.get(s.data["stage"], ()) if s.get(key.metric)]
    pairs = [("ppo/zero_shot_cot-sft/zero_shot_cot/", "PPO over SFT, CoT")]
    pairs += [(f"{model}/zero_shot_cot-{model}/direct/", f"CoT over direct, {MODELS[model]}") for model in ("ppo", "sft", "base")]
    ordered = sorted(s.manifest.metrics, key=lambda name: not name.endswith("/all"))  # pooled over the tasks first, where there are several
    return [Key(name, label, GAIN) for pair, label in pairs for name in ordered if name.startswith(pair)]


def steps(stages: Stages, missing: Mapping[str, str], order: list[str]) -> list[Step]:
    return [step(name, stages) if name in stages else Step(name, "", why=missing.get(name, "")) for name in order]


def step(name: str, stages: Stages) -> Step:
    s = stages[name]
    said = [VERDICTS[name](s, stages)] if name in VERDICTS else []
    said += [("warn", why) for why in outdated(name, stages)]
    level = max((level for level, _ in said), key=RANK.index, default="none")
    why = "; ".join(text for _, text in said if text)
    shown = f"{key.label} {s.full(key.metric, key.form)}" if (key := next(iter(keys(s)), None)) else ""
    return Step(name, clock(s.provenance["wall_s"]), shown, level, why, tuple(s.data.get("parents", ())))


def outdated(name: str, stages: Stages) -> list[str]:
    """Parents that are no longer what this stage was made from."""
    return [f"made from another {parent}" for parent, fingerprint in stages[name].data.get("parents", {}).items()
            if parent in stages and stages[parent].fingerprint != fingerprint]


def moved(s: Stage, key: str, label: str, form: Form) -> Said:
    """By the interval of a change for which up is good."""
    if not s.get(key):
        return "none", ""
    ends = s.ends(key)
    level = "warn" if ends is None or ends[0] <= 0 <= ends[1] else "pass" if ends[0] > 0 else "fail"
    shown = next(iter(keys(s)), None)  # beside the verdict already
    return level, verdict(ends) if shown and shown.metric == key else f"{label} {s.short_form(key, form)}, {verdict(ends)}"


def worse(*said: Said) -> Said:
    return max((level for level, _ in said), key=RANK.index), "; ".join(text for _, text in said if text)


def prepare(s: Stage, stages: Stages) -> Said:
    sets = s.notes.get("contamination") or {}
    found = [f"{s.value(f'contamination/{name}', SHARE)} of {name}" for name in sets if (s.get(f"contamination/{name}") or {}).get("value")]
    if not sets:
        return "none", "no evaluation set was looked for"
    return ("warn", f"in the training text: {', '.join(found)}") if found else ("pass", "no evaluation question is in the training text")


def scaling(s: Stage, stages: Stages) -> Said:
    main, prediction = stages.get("pretrain"), product(s, "prediction")
    if not main or main.counts.get("tokens") != prediction["D"] or not (measured := main.get(prediction["loss"])):
        return "none", "nothing measured to hold it against"
    low, high = prediction["interval"]
    inside = low <= measured["value"] <= high
    said = ("pass" if inside else "fail"), (f"measured {main.value(prediction['loss'], LOSS)}, {'inside' if inside else 'outside'} the "
                                            f"predicted {s.interval('predicted_loss', LOSS)}")
    if bound := product(s, "fit").get("at_bound"):
        return worse(said, ("warn", f"{', '.join(bound)} at the bound of what was tried"))
    return said


def product(s: Stage, name: str) -> dict[str, Any]:
    return json.loads(s.manifest.product(name).read_text(encoding="utf-8"))


def pretrain(s: Stage, stages: Stages) -> Said:
    """Whether held-out loss still fell at the end; a rise counts from the width of the last figure's interval on."""
    log, ends = s.path / "metrics.jsonl", s.ends("heldout_loss")
    looks = [row for row in read_metrics(log) if "heldout/loss" in row]
    if len(looks) < 2 or ends is None:
        return "none", ""
    last, best = looks[-1], min(looks, key=lambda row: row["heldout/loss"])
    if last["heldout/loss"] - best["heldout/loss"] <= ends[1] - ends[0]:
        return "pass", "held-out loss was lowest at the end"
    before, after = (number(LOSS.text(row["heldout/loss"]), f"{log}#{row['step']}/heldout/loss") for row in (best, last))
    return "warn", f"held-out loss was {before} at step {best['step']} and {after} at the end"


def sft(s: Stage, stages: Stages) -> Said:
    learned = next((key for key in ("worked_accuracy", "stop_rate") if s.get(f"change/{key}")), "")
    said = moved(s, f"change/{learned}", {"worked_accuracy": "right answers", "stop_rate": "answers that end"}.get(learned, ""), GAIN)
    ends = s.ends("change/base_loss")
    return worse(said, ("warn", f"forgot: loss on the base corpus {s.short_form('change/base_loss', CHANGE)}")
                 if ends and ends[0] > 0 else ("none", ""))


def preferences(s: Stage, stages: Stages) -> Said:
    ends = s.ends("agreement_alpha")
    if ends is None:
        return "none", "ranked by a program: nobody agrees or not" if s.notes.get("simulated") else "agreement of annotators not measured"
    level = "pass" if ends[0] >= ALPHA[1] else "fail" if ends[1] < ALPHA[0] else "warn"
    return level, f"agreement (alpha) {s.short_form('agreement_alpha')}; {ALPHA[1]:g} is reliable, below {ALPHA[0]:g} no conclusion holds"


def reward_model(s: Stage, stages: Stages) -> Said:
    judged = judge(s.manifest.metrics)
    reasons = [r for r in judged.reasons if r.level == judged.level]
    told = [number(r.sentence.replace(r.name, called("reward_model", r.name), 1), s.origin("metrics", r.name) + " by reward/gate.py")
            for r in reasons if r.value is not None][:1]
    count = f"{len(reasons)} of {len(judged.reasons)} figures {judged.level}"
    return judged.level, f"the gate: {'; '.join([*told, count])}"


def ppo(s: Stage, stages: Stages) -> Said:
    said = [moved(s, "gain/gold", "gold score", CHANGE)]
    if alarms := s.notes.get("alarms"):
        said.append(("warn", f"{len(alarms)} alarm{'s' * (len(alarms) > 1)} of reward hacking: "
                             f"{', '.join(dict.fromkeys(a['name'] for a in alarms))}"))
    return worse(*said)


def evaluation(s: Stage, stages: Stages) -> Said:
    key = next(iter(keys(s)), None)
    return moved(s, key.metric, key.label, key.form) if key else ("none", "")


VERDICTS: dict[str, Callable[[Stage, Stages], Said]] = {
    "prepare": prepare, "scaling": scaling, "pretrain": pretrain, "sft": sft, "preferences": preferences,
    "reward_model": reward_model, "rejection_sampling": lambda s, _: moved(s, "gain/gold", "gold score", CHANGE), "ppo": ppo,
    "evaluation": evaluation}
