"""Two runs of the pipeline side by side: what was set otherwise, what came out, and how far apart it is.

Differences are the first run's figure minus the second's. Where both evaluations asked the same problems they are paired by problem;
elsewhere their interval is made from those of both sides, as if the two were independent.
"""
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stages.run import figures, story, story_pipeline
from stages.run.cited import CHANGE, LOSS, MISSING, SHARE, TITLES, Form, Stage, Stages, draw, short_hash, verdict
from stages.run.console import clock
from stages.run.names import called
from stages.run.page import LEVELS, Figure, Page, Section, Table, foreign, number

Records = Sequence[Mapping[str, Any]]
Paired = Callable[[Records, Records], Mapping[str, Any]]  # difference, ci95, n and p of the first minus the second
CURVES = {"pretrain": (("heldout/loss", "tokens", "held-out loss"), ("train/loss", "tokens", "training loss")),
          "sft": (("eval/loss", "step", "validation loss"), ("forgetting/base_loss", "step", "loss on the base corpus")),
          "reward_model": (("heldout/accuracy", "step", "held-out pairs ordered right"),),
          "ppo": (("objective/score", "step", "reward (proxy)"), ("objective/gold", "step", "gold score"),
                  ("objective/kl", "step", "KL (nats a response)"), ("objective/entropy", "step", "entropy (nats a token)"))}
NO_SETTINGS = ("recipe", "run_dir", "parents", "report_to")


class Side(NamedTuple):
    """A run's name on the page and its finished stages."""

    name: str
    stages: Stages


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[float, tuple[float, float] | None]:
    """a - b of two metrics, and its 95 % interval from those of both, None where one has none.

    The square-and-add method (Newcombe 1998, independent proportions, method 10; for any statistic Zou and Donner 2008, "MOVER"): each
    limit's distance is the root of the sum of the squared distances of the limits that it comes from.
    """
    x, y = a["value"], b["value"]
    if not (a.get("ci95") and b.get("ci95")):
        return x - y, None
    (low, high), (low_b, high_b) = a["ci95"], b["ci95"]
    return x - y, (x - y - math.hypot(x - low, high_b - y), x - y + math.hypot(high - x, y - low_b))


def tell(first: Side, second: Side, folder: Path, *, paired: Paired) -> Page:
    """The page. Raises ValueError where the two have no finished stage in common."""
    both = [name for name in first.stages if name in second.stages]
    if not both:
        raise ValueError(f"{first.name} and {second.name} have no finished stage in common: "
                         f"{', '.join(first.stages) or 'none'}; {', '.join(second.stages) or 'none'}")
    same = [name for name in both if first.stages[name].fingerprint == second.stages[name].fingerprint]
    other = [name for name in both if name not in same]
    lead = (f"\"{first.name}\" against \"{second.name}\", stage by stage; every difference is the first minus the second. Its interval "
            "says what other problems or texts might have given, not what training with another seed would. It is paired by problem where "
            "both were asked the same problems; elsewhere it is made from the intervals of both as if they were independent, and is too "
            "wide where they were measured on the same texts.")
    warnings = [f"{side.name}: {text}" for side in (first, second) for text in story.warnings(side.stages)]
    for a, b in ((first, second), (second, first)):
        if alone := [name for name in a.stages if name not in b.stages]:
            warnings.append(f"Only {a.name} has finished {', '.join(alone)}.")
    sides = [s.cite() for side in (first, second) for s in side.stages.values()]
    lines = [row(first, second, name, key.metric, f"{TITLES[name]}: {key.label}", key.form)
             for name in other for key in story_pipeline.keys(first.stages[name]) if second.stages[name].get(key.metric)]
    caption = "Key figures." if lines else "No key figure to compare: " + (
        f"none that both have measured in {', '.join(other)}." if other else "every stage is the very same run on both sides.")
    summary = Table(header(first, second), lines, caption, sides, stack=True)
    sections = [settings(first, second, same, other), verdicts(first, second, both)]
    sections += [stage_section(first, second, name, folder, paired) for name in other]
    records = [table._replace(caption=f"{side.name}: {table.caption}") for side in (first, second)
               for table in story.records(side.stages).tables]
    return Page(f"Plumbline: {first.name} against {second.name}", lead, warnings, [], summary,
                [*sections, costs(first, second, both), Section("records", "Where every number comes from", [], tables=records)])


def header(first: Side, second: Side) -> list[str]:
    return ["", first.name, second.name, "difference", "95 % interval", "how"]


def row(first: Side, second: Side, stage: str, key: str, label: str, form: Form) -> list[str]:
    """A metric of both and its difference, from both intervals."""
    a, b = first.stages[stage], second.stages[stage]
    change = Form(form.digits, form.scale, "+", " points" if form.unit == SHARE.unit else form.unit)
    value, ends = difference(a.manifest.metrics[key], b.manifest.metrics[key])
    where = f"{a.origin('metrics', key)} - {b.origin('metrics', key)}"
    return [label, a.full(key, form), b.full(key, form), number(change.text(value), where),
            number(change.between(ends), where) if ends else "no interval",
            f"from both intervals: {verdict(ends)}" if ends else "one side has no interval"]


def settings(first: Side, second: Side, same: list[str], other: list[str]) -> Section:
    rows = []
    for name in other:
        a, b = (s.data.get("identity", {}).get("config") or {k: v for k, v in s.config.items() if k not in NO_SETTINGS}
                for s in (first.stages[name], second.stages[name]))
        rows += [[name, key, *(foreign(json.dumps(of[key])) if key in of else "-" for of in (a, b))]
                 for key in dict.fromkeys([*a, *b]) if not (key in a and key in b and a[key] == b[key])]
        for group in ("inputs", "parents"):
            c, d = (s.data.get(group, {}) for s in (first.stages[name], second.stages[name]))
            rows += [[name, f"{group[:-1]} {foreign(key)}", *(short_hash(of[key]) if key in of else "-" for of in (c, d))]
                     for key in dict.fromkeys([*c, *d]) if c.get(key) != d.get(key)]
    text = [f"The very same run on both sides: {', '.join(same)}."] if same else []
    if unlike := [name for name in other if not any(r[0] == name for r in rows)]:
        text.append(f"Another run of the same settings: {', '.join(unlike)}.")
    return Section("settings", "What was set otherwise", text, tables=[
        Table(["stage", "setting", first.name, second.name], rows, "Settings that can change the numbers, data from outside and parents.",
              [s.cite() for side in (first, second) for name, s in side.stages.items() if name in other], stack=True)] if rows else [])


def verdicts(first: Side, second: Side, both: list[str]) -> Section:
    rows = []
    for name in both:
        steps = [story_pipeline.step(name, side.stages) for side in (first, second)]
        rows.append([name, *(f"{LEVELS[step.level]}: {step.why}" if step.why else LEVELS[step.level] for step in steps)])
    return Section("verdicts", "What each side's own measures say", [], tables=[
        Table(["stage", first.name, second.name], rows, "Verdicts, as in the report of either.",
              [s.cite() for side in (first, second) for name, s in side.stages.items() if name in both], stack=True)])


def stage_section(first: Side, second: Side, name: str, folder: Path, paired: Paired) -> Section:
    a, b = first.stages[name], second.stages[name]
    sources = [a.cite(), b.cite()]
    drawn: list[Figure] = []
    for key, x, label in CURVES.get(name, ()):
        curves = [side.stages[name].series(side.name, key, x, per=per_iteration(side.stages[name]), look=look, color=color)
                  for color, (side, look) in enumerate(((first, "line"), (second, "dashed")))]
        if all(curves):
            drawn.append(draw(figures.plot, folder, f"{name}-{key.replace('/', '-')}", [series for found in curves for series in found],
                              f"{TITLES[name]}: {label}; {first.name} solid, {second.name} dashed.",
                              [a.cite("metrics.jsonl"), b.cite("metrics.jsonl")], y=label,
                              x="training tokens" if x == "tokens" else "iteration" if name == "ppo" else "step"))
    tables = []
    if name == "evaluation" and (rows := paired_rows(first, second, paired)):
        tables.append(Table(["", first.name, second.name, "difference", "95 % interval", "n", "p"], rows, "The same problems asked of "
                            "both: differences are paired by problem. p: McNemar's; intervals and p are one by one.", sources))
    shared = [key for key in a.manifest.metrics if b.get(key)]
    if shared:
        tables.append(Table(header(first, second), [row(first, second, name, key, called(name, key), form_of(key)) for key in shared],
                            "Every figure that both have measured.", sources, stack=True, folded=True))
    return Section(name, TITLES[name], [], drawn, tables)


def per_iteration(s: Stage) -> float:
    return s.config.get("epochs", 1) * s.config.get("minibatches", 1) if s.data["stage"] == "ppo" else 1


def form_of(key: str) -> Form:
    return LOSS if "loss" in key else CHANGE if key.startswith(("gain/", "change/")) else Form(3)


def paired_rows(first: Side, second: Side, paired: Paired) -> list[list[str]]:
    """Cells of model, task and strategy that both asked, of tasks whose problems are the same by their hash."""
    a, b = first.stages["evaluation"], second.stages["evaluation"]
    if not all("items" in s.manifest.data["products"] for s in (a, b)):
        return []
    rows = []
    for file in sorted(a.manifest.product("items").glob("*/*.jsonl")):
        model, (task, strategy) = file.parent.name, file.stem.rsplit(".", 1)
        twin = b.manifest.product("items") / model / file.name
        asked = [s.data.get("inputs", {}).get(f"task {task}") for s in (a, b)]
        if not twin.is_file() or asked[0] is None or asked[0] != asked[1]:
            continue
        records = [read(file), read(twin)]
        found = paired(*records)
        where = f"{file} - {twin}"
        shares = [number(SHARE.text(sum(bool(r["correct"]) for r in of) / len(of)), str(path))
                  for of, path in zip(records, (file, twin), strict=True)]
        gain = Form(1, 100, "+", " points")
        rows.append([f"{model}, {task}, {strategy}", *shares, *(number(text, where) for text in (
            gain.text(found["difference"]), gain.between(found["ci95"]), f"{found['n']:,}", f"{found['p']:.2g}"))])
    return rows


def read(file: Path) -> list[dict[str, Any]]:
    """Records without their texts."""
    with file.open(encoding="utf-8") as lines:
        return [{key: row.get(key) for key in ("id", "correct", "template")} for row in map(json.loads, lines)]


def costs(first: Side, second: Side, both: list[str]) -> Section:
    rows = []
    for name in both:
        sides = first.stages[name], second.stages[name]
        rows.append([name, *(number(clock(s.provenance["wall_s"]), s.origin("provenance", "wall_s")) for s in sides),
                     *(s.count("tokens") for s in sides), *(s.count("flops") for s in sides),
                     ratio(*(s.counts.get("flops") for s in sides))])
    return Section("costs", "Time and FLOPs", [f"{side.name}: on {story.hardware(side.stages)}." for side in (first, second)], tables=[
        Table(["stage", *(f"{what}, {side.name}" for what in ("time", "tokens", "FLOPs") for side in (first, second)), "ratio of FLOPs"],
              rows, "What each took.", [s.cite() for side in (first, second) for name, s in side.stages.items() if name in both])])


def ratio(a: float | None, b: float | None) -> str:
    return number(f"{a / b:.2f}", "counts/flops over counts/flops") if a is not None and b else MISSING
