"""What the report tells of the price of accuracy: frontiers, equal budgets, examples in the prompt, training against inference, and the
table of all pairs. All of it is in an evaluation's results.json (stages.evals.frontier, stages.evals.pairs)."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.run import figures
from stages.run.cited import GAIN, SHARE, draw
from stages.run.figures import Series, short
from stages.run.page import Figure, Table, number

Names = Mapping[str, str]  # how the report writes a strategy or a model
BARE = {"direct": 0, "few_shot": None}  # strategies by their number of examples; None: what the evaluation set
WORKED = {"zero_shot_cot": 0, "few_shot_cot": None}


def file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text)


def ring(points: Sequence[Mapping[str, Any]], x: str) -> Series:
    """Marks on the points of the Pareto set."""
    best = [p for p in points if p["pareto"]]
    return Series("Pareto set", [p[x] for p in best], [p["accuracy"] for p in best], look="ring")


def bars_of(points: Sequence[Mapping[str, Any]], label: str, x: str, **look: Any) -> Series:
    low, high = ([p["ci95"][i] for p in points] for i in (0, 1))
    return Series(label, [p[x] for p in points], [p["accuracy"] for p in points], low, high, **look)


def frontier(found: Mapping[str, Any], folder: Path, source: list[str], strategies: Names, models: Names) -> Figure:
    """Accuracy against tokens of one model's strategies on one task."""
    curve = [p for p in found["points"] if p["k"] is not None]
    series = [bars_of(curve, f"vote of 1 to {curve[-1]['k']} chains", "tokens", look="band")] if curve else []
    for p in found["points"]:
        if p["k"] is None:
            series.append(bars_of([p], strategies.get(p["strategy"], p["strategy"]), "tokens", look="points"))
    counted = "prompt and generated" if found["counted"] == "prompt and generated" else "generated ones only: prompts not recorded"
    return draw(figures.plot, folder, file_name(f"frontier-{found['task']}-{found['model']}"), [*series, ring(found["points"], "tokens")],
                f"{found['task']}, {models.get(found['model'], found['model'])}: what accuracy costs in tokens ({counted}), with 95 % "
                f"intervals, n {found['n']}. Rings: no other point is as cheap and as good.", source, x="tokens a question", y="accuracy",
                log_x=True, y_range=(0, 1.02))


def compute_series(points: Sequence[Mapping[str, Any]], models: Names) -> list[Series]:
    """Accuracy against FLOPs of an answer on one task: a colour for each model, which is named with the FLOPs of its training, its votes a
    band, and rings on the Pareto set."""
    series = []
    for color, model in enumerate(dict.fromkeys(p["model"] for p in points)):
        own = sorted((p for p in points if p["model"] == model), key=lambda p: p["inference_flops"])
        label = f"{models.get(model, model)}, {short(own[0]['training_flops'])} to train"
        for k, look in ((False, "points"), (True, "band")):
            if some := [p for p in own if (p.get("k") is not None) == k]:
                series.append(bars_of(some, label, "inference_flops", look=look, color=color))
                label = ""
    return [*series, ring(points, "inference_flops")]


def compute(points: Sequence[Mapping[str, Any]], folder: Path, source: list[str], models: Names) -> list[Figure]:
    """A figure a task: accuracy against FLOPs of an answer, a colour for each model, which is named with the FLOPs of its training."""
    drawn = []
    for task in dict.fromkeys(p["task"] for p in points):
        here = [p for p in points if p["task"] == task]
        caption = (f"{task}: training against inference. Across: FLOPs of answering a question, 2N a token"
                   + ("" if all(p["counted"] == "prompt and generated" for p in here) else ", prompts left out where not recorded")
                   + "; in the legend: FLOPs of training, of the stages that the model was made from. Rings: no other point needs as "
                   "little of both and gets as much right.")
        drawn.append(draw(figures.plot, folder, file_name(f"compute-{task}"), compute_series(here, models), caption, source,
                          x="FLOPs a question", y="accuracy", log_x=True, y_range=(0, 1.02)))
    return drawn


def example_series(cells: Sequence[Mapping[str, Any]], shots: int, models: Names) -> list[Series]:
    """Accuracy against the number of examples in the prompt on one task: a colour for each model, worked steps solid, bare answers dashed.

    The number is a cell's `shots` where it has one, else 0 without examples and `shots` with them.
    """
    series = []
    for color, model in enumerate(models):
        for kind, family, look in ((", worked", WORKED, "line"), (", bare", BARE, "dashed")):
            own = [{**c, "shots": c.get("shots", family[c["strategy"]] if family[c["strategy"]] is not None else shots),
                    "ci95": c["wilson95"]} for c in cells if c["model"] == model and c["strategy"] in family]
            own.sort(key=lambda c: c["shots"])
            if len({c["shots"] for c in own}) > 1:
                series.append(bars_of(own, models[model] + kind, "shots", look=look, color=color))
    return series


def examples(cells: Sequence[Mapping[str, Any]], shots: int, folder: Path, source: list[str], models: Names) -> list[Figure]:
    """In-context learning, a figure a task that was asked with more than one number of examples."""
    drawn = []
    for task in dict.fromkeys(c["task"] for c in cells):
        if series := example_series([c for c in cells if c["task"] == task], shots, models):
            drawn.append(draw(figures.plot, folder, file_name(f"examples-{task}"), series, f"{task}: accuracy against the number of "
                              "examples in the prompt, with worked steps (solid) and without (dashed), with 95 % intervals.", source,
                              x="examples in the prompt", y="accuracy", y_range=(0, 1.02)))
    return drawn


def matched(found: Sequence[Mapping[str, Any]], results: Path, source: list[str], strategies: Names, models: Names) -> list[Table]:
    """Each strategy beside a vote that spends as many tokens."""
    rows = []
    for of in found:
        for m in of["matched"]:
            where = f"{results}#frontier/{of['model']}/{of['task']}/{m['strategy']}"
            rows.append([models.get(of["model"], of["model"]), of["task"], strategies.get(m["strategy"], m["strategy"]), *(
                number(text, f"{where}/{key}") for key, text in (
                    ("tokens", f"{m['tokens']:.1f}"), ("k", f"{m['k']:.2f}"), ("accuracy", SHARE.text(m["accuracy"])),
                    ("against_accuracy", SHARE.text(m["against_accuracy"])), ("difference", GAIN.text(m["difference"])),
                    ("ci95", GAIN.between(m["ci95"])), ("n", f"{m['n']:,}")))])
    header = ["model", "task", "strategy", "tokens", "chains for them", "accuracy", "the vote's", "difference", "95 % interval", "n"]
    return [Table(header, rows, "Equal budgets: each strategy beside a vote that spends as many tokens a question. A broken number of "
                  "chains is a mixture of the two next to it. Strategies cheaper than one chain or dearer than all have no match.", source)
            ] if rows else []


def pair_rows(rows: Sequence[Mapping[str, Any]], results: Path, source: list[str], strategies: Names, models: Names) -> Table:
    """All pairs, with p adjusted for how many there are and the difference that so many problems could have shown."""
    shown = []
    for p in rows:
        (m, a), (n, b) = (side.split("/", 1) for side in (p["a"], p["b"]))
        first, second = strategies.get(a, a), strategies.get(b, b)
        where = f"{results}#pairs/{p['a']}-{p['b']}/{p['task']}"
        shown.append([f"{models.get(m, m)}: {first} - {second}" if m == n else f"{first}: {models.get(m, m)} - {models.get(n, n)}",
                      p["task"], *(number(text, f"{where}/{key}") for key, text in (
                          ("difference", GAIN.text(p["difference"])), ("ci95", GAIN.between(p["ci95"])), ("n", f"{p['n']:,}"),
                          ("p", f"{p['p']:.2g}"), ("p_holm", f"{p['p_holm']:.2g}"))),
                      number(f"{100 * p['mde']:.1f} points", f"{where}/mde") if p["mde"] else "unknown"])
    grouped = any("clusters" in p for p in rows)
    return Table(["first minus second", "task", "difference", "95 % interval", "n", "p", "Holm p", "detectable"], shown,
                 f"All {len(rows)} pairs, both sides on the same problems. p: McNemar's, for shares random sign flips; Holm p: adjusted "
                 "for all rows of this table, which keeps the chance of any false find at 5 %. Intervals are one by one. Detectable: the "
                 "least difference that so many problems show with 80 % power; a smaller one may well be there unseen."
                 + (" Problems of one template count as one cluster." if grouped else ""), source, folded=True)
