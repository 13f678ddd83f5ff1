"""The report's section on the scaling law: the ladder, the law through it, the prediction and what came; and its figures."""
import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stages.run import figures
from stages.run.checkpoint import read_metrics
from stages.run.cited import ERROR, LOSS, MEASURED, MISSING, SHARE, TITLES, Stage, Stages, Told, draw
from stages.run.figures import Series, short
from stages.run.page import Section, Table, number

Law = Callable[..., Any]  # law(fit, N, D): the loss by the fitted law (stages.laws.fit)
Point = Mapping[str, Any]  # a run of the ladder, or the prediction: N, D, flops and loss
CONSTANTS = {"sum": ("E", "A", "B", "alpha", "beta"), "product": ("E", "C", "a", "b")}
CONSTANTS["mean"] = (*CONSTANTS["sum"], *CONSTANTS["product"][1:])


class Drawing(NamedTuple):
    """A figure before it is drawn: what `figures.plot` takes, and the words under it."""

    name: str
    series: Sequence[Series]
    caption: str
    options: Mapping[str, Any]


def scaling(stages: Stages, folder: Path, law: Law) -> Told:
    s, main = stages["scaling"], stages.get("pretrain")
    fit, prediction = (json.loads(s.manifest.product(name).read_text(encoding="utf-8")) for name in ("fit", "prediction"))
    written = s.manifest.product("points").read_text(encoding="utf-8").splitlines()
    points = sorted(map(json.loads, written), key=lambda p: (p["N"], p["D"]))
    sizes, budgets = (sorted({p[key] for p in points}) for key in ("N", "D"))

    form, product = fit.get("form", "sum"), fit.get("product", {})
    inside = {name: (product, "product/") if name in product else (fit, "") for name in CONSTANTS[form]}
    ends = {name: where["intervals"][name] for name, (where, _) in inside.items() if name in where["intervals"]}

    def constant(name: str) -> str:
        return number(f"{inside[name][0][name]:.3g}", f"{s.manifest.product('fit')}#{inside[name][1]}{name}")

    def fitted(p: Mapping[str, Any]) -> float:
        return float(law(fit, p["N"], p["D"]))

    terms = {"sum": "{A} / N^{alpha} + {B} / D^{beta}", "product": "{C} / (N^{a} D^{b})"}
    told = ("the geometric mean of two laws, L = " if form == "mean" else "the law L = ") + " and L = ".join(
        ("{E} + " + terms[part]).format(**{name: constant(name) for name in CONSTANTS[part]})
        for part in (terms if form == "mean" else [form]))
    text = (f"{s.count('runs')} runs of {len(sizes)} sizes and {len(budgets)} token budgets "
            f"(learning rate: {fit['conventions'].get('schedule', MISSING)}) determine {told} "
            f"(N: {fit['conventions'].get('N', MISSING)}; D: training tokens). For the main model it predicts "
            f"{s.short_form('predicted_loss', LOSS)}.")
    if s.get("holdout_error"):
        text += (f" Fitted on the cheaper runs only, it is off by {s.value('holdout_error', SHARE)} on average on the "
                 f"{s.n('holdout_error')} dearest, of which {s.value('holdout_coverage', SHARE)} lie inside their 95 % intervals.")
    if s.get("holdout_error_4x"):
        text += (f" Fitted on runs of at most a quarter of the dearest one's FLOPs, it is off by {s.value('holdout_error_4x', SHARE)} on "
                 f"those at four times its dearest or more ({s.n('holdout_error_4x')}).")
    paragraphs, lines = [text], []
    measured = None
    if main:
        same = main.counts.get("tokens") == prediction["D"]
        measured = main.get(prediction["loss"]) if same else None
        paragraph, line = prediction_and_result(s, main, prediction, measured)
        paragraphs.append(paragraph)
        lines = [line]
    table = Table(["run", "N", "D", "loss", "by the law", "off by"], [
        [p["run"], *(number(t, f"{s.manifest.product('points')}#{p['run']}") for t in (
            f"{p['N']:,}", f"{p['D']:,}", LOSS.text(p["loss"]), LOSS.text(fitted(p)), ERROR.text(fitted(p) / p["loss"] - 1)))]
        for p in points], "Every run of the ladder.", [s.cite("points.jsonl", "fit.json")], folded=True)
    letters = Table(MEASURED, [[name, constant(name), number("[{:.3g}, {:.3g}]".format(*ends[name]),
                                                             f"{s.manifest.product('fit')}#{inside[name][1]}intervals/{name}")
                                if name in ends else "no interval", s.n(name)] for name in CONSTANTS[form]],
                    "The law's constants; intervals are those of a residual bootstrap, of a product's C, a and b those of least squares.",
                    [s.cite("fit.json")])
    if "flops_unshared" in s.counts and s.counts["flops_unshared"] > s.counts["flops"]:
        paragraphs.append(f"Budgets of one size share their beginning: the ladder took {s.count('flops')} FLOPs; with every budget trained "
                          f"from its beginning it would have taken {s.count('flops_unshared')}.")
    if fit.get("warnings"):
        paragraphs.append("The fit warns: " + "; ".join(fit["warnings"]) + ".")
    drawn = scaling_figures(s, main, folder, points, prediction, measured, fitted)
    return Section("scaling", TITLES["scaling"], paragraphs, drawn, [table, letters]), lines


def prediction_and_result(s: Stage, main: Stage, prediction: Mapping[str, Any],
                          measured: Mapping[str, Any] | None) -> tuple[str, list[str]]:
    """The paragraph and the summary line that hold the forecast against what came."""
    key, label = prediction["loss"], "Held-out loss of the main model against the prediction"
    if measured is None:
        return ("The main model has no figure to hold against the prediction: it was trained on another budget, or this loss was not "
                "measured.", [label, MISSING, MISSING, MISSING, f"predicted {s.short_form('predicted_loss', LOSS)}"])
    forecast, when = main.notes.get("forecast") or {}, prediction.get("written")
    ahead = bool(when) and forecast.get("value") == prediction["value"] and (
        datetime.datetime.fromisoformat(str(when)) <= datetime.datetime.fromisoformat(main.provenance["started"]))
    low, high = prediction["interval"]
    inside = "inside" if low <= measured["value"] <= high else "outside"
    error = number(ERROR.text(prediction["value"] / measured["value"] - 1),
                   f"{s.manifest.product('prediction')}#value over {main.origin('metrics', key, 'value')} - 1")
    paragraph = (f"Measured then: {main.short_form(key, LOSS)}. The prediction is off by {error}, and what was measured lies {inside} "
                 "its 95 % interval. " + (
                     "It was written down before the main model was trained." if ahead else
                     "It was not on record when the main model's training began: a check of the law, not a forecast."))
    return paragraph, [label, f"off by {error}", f"{s.interval('predicted_loss', LOSS)} predicted", main.n(key),
                       f"predicted {s.value('predicted_loss', LOSS)}, measured {main.value(key, LOSS)}, {inside} the interval; "
                       + ("written down before training" if ahead else "not on record before this training began")]


def scaling_figures(s: Stage, main: Stage | None, folder: Path, points: Sequence[Point], prediction: Mapping[str, Any],
                    measured: Mapping[str, Any] | None, fitted: Callable[[Point], float]) -> list[Any]:
    logs = [s.cite("*/metrics.jsonl"), *([main.cite("metrics.jsonl")] if main else [])]
    runs = [s.cite("fit.json", "prediction.json", "points.jsonl"), *([main.cite()] if main else [])]
    curves = json.loads(s.manifest.product("curves").read_text(encoding="utf-8")) if "curves" in s.data["products"] else {}
    drawings = [*training_curves(s.path, points, main.path if main else None),
                *law_drawings(points, prediction, fitted, measured["value"] if measured else None, s.config.get("parameters", "N")),
                *compute_drawings(s.path, points, prediction, fitted, curves)]
    return [draw(figures.plot, folder, d.name, d.series, d.caption, logs if d.name.startswith("ladder-") else runs, **d.options)
            for d in drawings]


def logged(run: Path, key: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run / "metrics.jsonl") if key in row and "tokens" in row]


def by_size(points: Sequence[Point]) -> dict[int, list[Point]]:
    return {N: [p for p in points if p["N"] == N] for N in sorted({p["N"] for p in points})}


def training_curves(ladder: Path, points: Sequence[Point], main: Path | None) -> list[Drawing]:
    """Losses over training, one line a run, one colour a size."""
    sizes, least = list(by_size(points)), min(p["D"] for p in points)
    named = [(ladder / p["run"], sizes.index(p["N"]), f"N = {short(p['N'])}" if p["D"] == least else "") for p in points]
    named += [(main, len(sizes), "main model")] if main else []

    def curves(key: str) -> list[Series]:
        found = [(label, color, logged(run, key)) for run, color, label in named]
        return [Series(label, [r["tokens"] for r in rows], [r[key] for r in rows], color=color) for label, color, rows in found if rows]

    axes = {"x": "training tokens", "log_x": True, "log_y": True}
    return [Drawing("ladder-heldout", curves("heldout/loss"), "Held-out loss over training, of every run of the ladder and of the main "
                    "model.", {"y": "held-out loss", **axes}),
            Drawing("ladder-training", curves("train/loss"), "Training loss of the same runs. It is low at first where training begins "
                    "with easy text.", {"y": "training loss", **axes})]


def name_of(loss: str) -> str:
    return "held-out loss" if loss == "heldout_loss" else loss


def law_drawings(points: Sequence[Point], prediction: Mapping[str, Any], fitted: Callable[[Point], float], measured: float | None,
                 parameters: str) -> list[Drawing]:
    """The law against tokens, against parameters, against what was measured, and what it leaves."""
    loss, (low, high) = name_of(prediction["loss"]), prediction["interval"]

    def against(x: str, each: str, letter: str) -> list[Series]:
        """Measured points and dashed law, one colour for each value of the other letter, up to the main model's."""
        values, reach = sorted({p[each] for p in points}), sorted([*(p[x] for p in points), prediction[x]])
        grid, series = spaced(reach[0], 1.3 * reach[-1]), []
        for color, value in enumerate(values):
            chosen = [p for p in points if p[each] == value]
            series.append(Series(f"{letter} = {short(value)}", [p[x] for p in chosen], [p["loss"] for p in chosen], look="points",
                                 color=color))
        for color, value in enumerate([*values, prediction[each]]):
            series.append(Series("", grid, [fitted({x: g, each: value}) for g in grid], look="dashed", color=color))
        series.append(Series("predicted", [prediction[x]], [prediction["value"]], [low], [high], "star", len(values)))
        if measured:
            series.append(Series("measured", [prediction[x]], [measured], look="points", color=len(values) + 1))
        return series

    check = [Series("ladder, fitted", [p["loss"] for p in points], [fitted(p) for p in points], look="points")]
    left = [Series(f"N = {short(N)}", [p["flops"] for p in own], [100 * (fitted(p) / p["loss"] - 1) for p in own], look="points",
                   color=color) for color, (N, own) in enumerate(by_size(points).items())]
    if measured:
        check.append(Series("main model, predicted", [measured], [prediction["value"]], [low], [high], "star"))
        left.append(Series("main model, predicted", [prediction["flops"]], [100 * (prediction["value"] / measured - 1)],
                           [100 * (low / measured - 1)], [100 * (high / measured - 1)], "star", len(left)))
    return [Drawing("law-tokens", against("D", "N", "N"), "Loss against training tokens; dashed: the law at each size. The star is the "
                    "prediction for the main model with its 95 % interval.", {"x": "training tokens", "y": loss, "log_x": True}),
            Drawing("law-parameters", against("N", "D", "D"), "The same against parameters; dashed: the law at each token budget.",
                    {"x": f"parameters ({parameters})", "y": loss, "log_x": True}),
            Drawing("law-check", check, "The law against what was measured; on the dotted line they agree. Ladder runs were fitted, the "
                    "main model was not.", {"x": f"measured {loss}", "y": f"{loss} by the law", "diagonal": True}),
            Drawing("law-residuals", left, "What the law leaves: its loss less the measured one, in per cent, against compute. A pattern "
                    "over compute is a wrong form, scatter is noise.", {"x": "training FLOPs", "y": "law less measured (%)",
                                                                        "log_x": True, "marks": {"no error": 0.0}})]


def compute_drawings(ladder: Path, points: Sequence[Point], prediction: Mapping[str, Any], fitted: Callable[[Point], float],
                     curves: Mapping[str, Any]) -> list[Drawing]:
    """Loss against compute with its envelope, and isoFLOP curves; none for a ladder that did not write them down."""
    if not curves:
        return []
    loss, sizes, series = name_of(prediction["loss"]), by_size(points), []
    a_token = [own[0]["flops"] / own[0]["D"] for own in sizes.values()]
    for color, (N, own) in enumerate(sizes.items()):
        series.append(Series(f"N = {short(N)}", [p["flops"] for p in own], [p["loss"] for p in own], look="points", color=color))
        for p in own:
            rows = logged(ladder / p["run"], "heldout/loss")
            series.append(Series("", [a_token[color] * r["tokens"] for r in rows], [r["heldout/loss"] for r in rows], look="dashed",
                                 color=color))
    envelope = curves["envelope"]
    series.append(Series("envelope", [e["C"] for e in envelope], [e["loss"] for e in envelope], color=len(sizes)))
    low, high = prediction["interval"]
    series.append(Series("predicted", [prediction["flops"]], [prediction["value"]], [low], [high], "star", len(sizes) + 1))
    found = [Drawing("ladder-compute", series, "Loss against compute. Points: finished runs; dashed: each run's held-out loss on the way, "
                     "before its rate had fallen; the envelope is the least loss of any size, straight in logs between finished runs.",
                     {"x": "training FLOPs", "y": loss, "log_x": True, "log_y": True})]
    series = []
    for color, row in enumerate(curves["isoflop"]):
        grid = spaced(min(row["N"]), max(row["N"]))
        costs = np.exp(np.interp(np.log(grid), np.log(list(sizes)), np.log(a_token)))
        series.append(Series(f"C = {short(row['C'])}", row["N"], row["loss"], look="points", color=color))
        series.append(Series("", grid, [fitted({"N": g, "D": row["C"] / cost}) for g, cost in zip(grid, costs, strict=True)],
                             look="dashed", color=color))
        if row["minimum"]:
            series.append(Series("", [row["minimum"]["N"]], [row["minimum"]["loss"]], look="ring", color=color))
    inside = sum(bool(row["minimum"]) for row in curves["isoflop"])
    caption = (f"Loss of the sizes at equal compute, straight in logs between two budgets of a size; dashed: the law. Rings: minima "
               f"between sizes ({inside} of {len(curves['isoflop'])} budgets; elsewhere the least loss is at an end, and the best size may "
               "lie outside the ladder).")
    return [*found, Drawing("law-isoflop", series, caption, {"x": "parameters", "y": loss, "log_x": True})] if series else found


def spaced(low: float, high: float, count: int = 40) -> list[float]:
    """Equal ratios from low to high."""
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]
