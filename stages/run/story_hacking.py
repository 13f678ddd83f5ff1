"""What the report tells of reward hacking in a PPO run: alarms, gold against proxy over KL beside best-of-n, samples on the way."""
import json
import math
from pathlib import Path
from typing import Any

from reward.alarms import WINDOW
from reward.overoptimization import traced
from stages.run import figures
from stages.run.checkpoint import read_metrics
from stages.run.cited import SCORE, Stage, draw
from stages.run.figures import Series
from stages.run.page import Figure, Table, foreign, number

CURVES, SAMPLES = "overoptimization.json", "samples.jsonl"
NAMES = (("proxy", "reward (proxy)"), ("gold", "gold score"))


def curves(s: Stage) -> dict[str, Any] | None:
    """What the run left of its curves, if it has measured them."""
    file = s.path / CURVES
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def paragraphs(s: Stage) -> list[str]:
    """Alarms, where the run stands by the fit, and best-of-n; nothing of a run that did not look."""
    told = []
    if "alarms" in s.notes:
        count, rows = len(s.notes["alarms"]), s.notes["watched_iterations"]
        told.append(f"{count} alarm{'s' if count > 1 else ''} of reward hacking {'were' if count > 1 else 'was'} raised (the table below)."
                    if count else "No alarm of reward hacking was raised." if rows >= WINDOW else
                    f"No alarm of reward hacking could be raised: they need {WINDOW} iterations.")
        if s.notes["kept_step"] != s.notes["last_step"]:
            told[-1] += (f" The product is the checkpoint of step {s.note(s.notes['kept_step'], 'kept_step')}, to which the run went back "
                         f"from step {s.note(s.notes['last_step'], 'last_step')}.")
    found = curves(s)
    if found and (place := found["ppo"]["standing"]):
        told.append(number(place["sentence"][0].upper() + place["sentence"][1:], f"{s.path / CURVES}#ppo/standing") + ".")
    if found and s.get("best_of_n/gold"):
        samples, kl = (number(text, f"{s.path / CURVES}#best_of_n/{key}") for text, key in (
            (str(found["best_of_n"]["n"][-1]), "n"), (f"{found['best_of_n']['kl'][-1]:.2f}", "kl")))
        told.append(f"Best of {samples} samples of the start by the same reward: gold score {s.full('best_of_n/gold')} "
                    f"problems, at a KL of {kl} nats a response.")
    return told


def drawn(s: Stage, folder: Path) -> list[Figure]:
    """Both scores over sqrt(KL) with the fits of Gao et al., and the gold score of PPO and of best-of-n over the same distance."""
    found = curves(s)
    if not found or not found["ppo"]["kl"]:
        return []
    run, best, source = found["ppo"], found["best_of_n"], [s.cite(CURVES)]

    def distances(kl: list[float]) -> list[float]:
        return [math.sqrt(max(0.0, k)) for k in kl]

    def fit(of: dict[str, Any], name: str, color: int) -> list[Series]:
        return [Series("", *traced(of["fits"][name], of["kl"]), look="dashed", color=color)] if of["fits"] and of["fits"][name] else []

    made = [draw(figures.plot, folder, "ppo-distance", [
        series for color, (name, label) in enumerate(NAMES)
        for series in (Series(label, distances(run["kl"]), run[name], look="points", color=color), *fit(run, name, color))],
        "Both scores against the distance travelled, where over-optimisation shows: the reward goes on rising, the gold score bends. "
        "Dashed: d (a - b log d), d = sqrt(KL) (Gao et al. 2023).", source, x="sqrt(KL), KL in nats a response", y="mean score")]
    if best:
        mean, low, high = zip(*best["gold"], strict=True)
        made.append(draw(figures.plot, folder, "ppo-best-of-n", [
            Series("PPO", distances(run["kl"]), run["gold"], look="points", color=0), *fit(run, "gold", 0),
            Series(f"best of n, up to {best['n'][-1]}", distances(best["kl"]), mean, low, high, look="squares", color=1),
            *fit(best, "gold", 1)],
            f"Gold score of PPO's iterations, on training problems, and of best-of-n by the same reward, on {best['prompts']} held-out "
            "ones (95 % intervals over them): compare how both rise with KL, not their levels. Dashed: the fits, d (a - b log d) and "
            "d (a - b d).", source, x="sqrt(KL), KL in nats a response",
            y="mean gold score"))
    return made


def tables(s: Stage) -> list[Table]:
    """The alarms, and the first and last answers to the fixed questions."""
    made = []
    if alarms := s.notes.get("alarms"):
        rows = [[a["name"], s.note(a["step"], "alarms", str(i), "step"), s.note(f"{a['value']:.3g}", "alarms", str(i), "value"),
                 f"{a['threshold']:g}", a["sentence"]] for i, a in enumerate(alarms)]
        made.append(Table(["alarm", "step", "value", "threshold", ""], rows, "Alarms of reward hacking, each when it was first raised "
                          "(docs/reward-hacking.md).", [s.cite("metrics.jsonl")], stack=True))
    looks = read_metrics(s.path / SAMPLES)
    rows = []
    for first, *_, last in zip(*(look["samples"] for look in looks), strict=True) if len(looks) > 1 else ():
        for look, sample in ((looks[0], first), (looks[-1], last)):
            where = f"{s.path / SAMPLES}#{look['step']}"
            rows.append([str(look["step"]), foreign(sample["prompt"]), foreign(sample["response"]), *(
                "-" if sample[key] is None else number(SCORE.text(sample[key]), f"{where}/{key}") for key in ("score", "gold", "kl"))])
    if rows:
        made.append(Table(["step", "prompt", "response", "reward", "gold", "KL"], rows, "The same questions, asked before and at the last "
                          "look; the sampler's noise is the same.", [s.cite(SAMPLES)], stack=True, folded=True))
    return made
