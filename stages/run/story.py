"""The report of a recipe, told from the manifests of its finished stages: data, scaling law and pretraining here, what comes
after in stages.run.story_alignment. A section takes the stages by name and the folder of the report's figures."""
import datetime
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stages.run import figures, story_alignment, story_pipeline, story_samples
from stages.run.checkpoint import read_metrics
from stages.run.cited import ERROR, LOSS, MEASURED, MISSING, SHARE, TITLES, Stage, Stages, Told, annotator, draw, short_hash
from stages.run.console import clock
from stages.run.figures import Series, short
from stages.run.manifest import MANIFEST, hash_data
from stages.run.page import Page, Section, Table, foreign, number

Law = Callable[..., Any]  # law(fit, N, D): the loss by the fitted law (stages.laws.fit)
CONSTANTS = {"sum": ("E", "A", "B", "alpha", "beta"), "product": ("E", "C", "a", "b")}


def tell(stages: Stages, missing: Mapping[str, str], folder: Path, *, recipe: str, law: Law) -> Page:
    """`stages` are the finished ones in the order of the pipeline; `missing` says of each other one that
    belongs to it what would make it."""
    sections: dict[str, Callable[[Stages, Path], Told]] = {
        "prepare": prepare, "scaling": lambda s, f: scaling(s, f, law), "pretrain": pretrain, **story_alignment.SECTIONS}
    told: dict[str, Told] = {}
    for name, section in sections.items():
        if name in stages:
            told[name] = section(stages, folder)
        elif name in missing:
            told[name] = Section(name, TITLES[name], [f"Not in this report: {missing[name]}."]), []
    lines = [line for name in ("scaling", "sft", "evaluation", "reward_model", "rejection_sampling", "ppo") if name in told
             for line in told[name][1]]
    seeds = ", ".join(map(str, sorted({s.data["seed"] for s in stages.values()})))
    lead = (f"From raw text to an aligned, evaluated model: what each stage of the recipe \"{recipe}\" did and what came out, on "
            f"{hardware(stages)}. It is one run (seed {seeds}): intervals say what other problems or texts might have given, not "
            "what training with another seed would.")
    summary = Table(["effect", "result", "95 % interval", "n", "beside it"], lines,
                    "What it shows." if lines else "What it shows: nothing yet, no stage that measures an effect has finished.",
                    [s.cite() for s in stages.values()], stack=True)
    steps = story_pipeline.steps(stages, missing, list(told))
    answers = story_samples.samples(stages)
    return Page(f"Plumbline: {recipe}", lead, warnings(stages), steps, summary,
                [*(section for section, _ in told.values()), *([answers] if answers else []), costs(stages), records(stages)])


def warnings(stages: Stages) -> list[str]:
    """What could mislead: products of different pipelines side by side, code that no commit holds, a simulated annotator."""
    found = []
    for name, s in stages.items():
        for parent, fingerprint in s.data.get("parents", {}).items():
            if parent in stages and stages[parent].fingerprint != fingerprint:
                found.append(f"{name} was made from another {parent} ({fingerprint.removeprefix('sha256:')[:12]}) than the one shown "
                             f"here ({stages[parent].short}): run make {name} again before reading them together.")
    if dirty := [name for name, s in stages.items() if s.provenance.get("dirty")]:
        found.append(f"Ran with uncommitted changes, so that the commit alone does not reproduce them: {', '.join(dirty)}.")
    commits = {s.provenance.get("commit") for s in stages.values()}
    if len(commits) > 1:
        found.append(f"The stages ran at {len(commits)} different commits; the table at the end names them.")
    if "preferences" in stages and stages["preferences"].notes.get("simulated"):
        found.append(f"No person ranked anything here: the preferences are by {annotator(stages)}.")
    return found


def prepare(stages: Stages, folder: Path) -> Told:
    s = stages["prepare"]
    dropped = "; ".join(f"{why}: {s.note(n, 'dropped', why)}" for why, n in s.notes.get("dropped", {}).items()) or "nothing"
    text = (f"{s.count('documents')} documents were kept, {s.value('kept_share', SHARE)} of {s.n('kept_share')} read (left out: "
            f"{dropped}). A tokenizer of {s.count('vocabulary')} tokens was trained on them and the text packed into rows of "
            f"{s.note(s.notes.get('row_length', MISSING), 'row_length')} tokens. Held-out documents are chosen by their hash.")
    tables = [Table(["part", "documents", "tokens", "rows"], [
        [part, *(s.count(f"{part}_{what}") for what in ("documents", "tokens", "rows"))]
        for part in ("train-easy", "train", "heldout") if f"{part}_tokens" in s.counts],
        "What the models are trained and measured on.", [s.cite()])]
    if sources := s.notes.get("sources"):
        tables.append(Table(["source", "tokens", "bytes a token", "tokens a number"], [
            [source, s.n(f"bytes_per_token/{source}"), *(s.value(f"{what}/{source}") for what in ("bytes_per_token", "tokens_per_number"))]
            for source in sources], "How the tokenizer cuts each source.", [s.cite()]))
    if contamination := s.notes.get("contamination"):
        tables.append(Table(["evaluation set", "questions", "found in training text"], [
            [name, s.n(f"contamination/{name}"), s.value(f"contamination/{name}", SHARE)] for name in contamination],
            "Questions of which 13 words in a row, or all, stand in the training text.", [s.cite()]))
    kinds = sorted(s.notes.get("kinds", {}).items(), key=lambda item: -item[1])
    if len(kinds) > 1:
        tables.append(Table(["kind of text", "documents"], [[kind, s.note(n, "kinds", kind)] for kind, n in kinds],
                            "Documents of each kind, training and held out together.", [s.cite()]))
    return Section("prepare", TITLES["prepare"], [text], tables=tables), []


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

    terms = (f"{constant('A')} / N^{constant('alpha')} + {constant('B')} / D^{constant('beta')}" if form == "sum" else
             f"{constant('C')} / (N^{constant('a')} D^{constant('b')})")
    text = (f"{s.count('runs')} runs of {len(sizes)} sizes and {len(budgets)} token budgets, each with a whole schedule of its own, "
            f"determine the law L = {constant('E')} + {terms} "
            f"(N: {fit['conventions'].get('N', MISSING)}; D: training tokens). For the main model it predicts "
            f"{s.short_form('predicted_loss', LOSS)}.")
    if s.get("holdout_error"):
        text += (f" Fitted on the cheaper runs only, it is off by {s.value('holdout_error', SHARE)} on average on the "
                 f"{s.n('holdout_error')} dearest, of which {s.value('holdout_coverage', SHARE)} lie inside their 95 % intervals.")
    paragraphs, lines = [text], []
    if form == "sum" and fit.get("at_bound"):
        paragraphs.append(f"Trust no prediction far from these runs: {', '.join(fit['at_bound'])} lies at the bound of what was tried, "
                          "so the runs do not determine it.")
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
                    f"The law's constants; intervals are those of {'least squares' if product else 'a residual bootstrap'}.",
                    [s.cite("fit.json")])
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


def scaling_figures(s: Stage, main: Stage | None, folder: Path, points: list[dict[str, Any]], prediction: Mapping[str, Any],
                    measured: Mapping[str, Any] | None, fitted: Callable[[Mapping[str, Any]], float]) -> list[Any]:
    sizes, budgets = (sorted({p[key] for p in points}) for key in ("N", "D"))
    logs = [s.cite("*/metrics.jsonl"), *([main.cite("metrics.jsonl")] if main else [])]
    runs = [s.cite("fit.json", "prediction.json", "points.jsonl"), *([main.cite()] if main else [])]
    loss = "held-out loss" if prediction["loss"] == "heldout_loss" else prediction["loss"]

    def curves(key: str) -> list[Series]:
        """One a run, one colour a size."""
        named = [(s.path / p["run"], sizes.index(p["N"]), f"N = {short(p['N'])}" if p["D"] == budgets[0] else "") for p in points]
        named += [(main.path, len(sizes), "main model")] if main else []
        logged = [(label, color, [r for r in read_metrics(run / "metrics.jsonl") if key in r and "tokens" in r])
                  for run, color, label in named]
        return [Series(label, [r["tokens"] for r in rows], [r[key] for r in rows], color=color) for label, color, rows in logged if rows]

    def against(x: str, each: str, letter: str, **options: Any) -> list[Series]:
        """Measured points and dashed law, one colour for each value of the other letter, up to the main model's."""
        values, reach, series = sorted({p[each] for p in points}), sorted([*(p[x] for p in points), prediction[x]]), []
        grid = spaced(reach[0], 1.3 * reach[-1])
        for color, value in enumerate(values):
            chosen = [p for p in points if p[each] == value]
            series.append(Series(f"{letter} = {short(value)}", [p[x] for p in chosen], [p["loss"] for p in chosen], look="points",
                                 color=color))
        for color, value in enumerate([*values, prediction[each]]):
            series.append(Series("", grid, [fitted({x: g, each: value}) for g in grid], look="dashed", color=color))
        low, high = prediction["interval"]
        series.append(Series("predicted", [prediction[x]], [prediction["value"]], [low], [high], "star", len(values)))
        if measured:
            series.append(Series("measured", [prediction[x]], [measured["value"]], look="points", color=len(values) + 1))
        return series

    check = [Series("ladder, fitted", [p["loss"] for p in points], [fitted(p) for p in points], look="points")]
    if measured:
        low, high = prediction["interval"]
        check.append(Series("main model, predicted", [measured["value"]], [prediction["value"]], [low], [high], "star"))
    log = {"x": "training tokens", "log_x": True, "log_y": True}
    return [
        draw(figures.plot, folder, "ladder-heldout", curves("heldout/loss"),
             "Held-out loss over training, of every run of the ladder and of the main model.", logs, y="held-out loss", **log),
        draw(figures.plot, folder, "ladder-training", curves("train/loss"),
             "Training loss of the same runs. It is low at first where training begins with easy text.", logs, y="training loss", **log),
        draw(figures.plot, folder, "law-tokens", against("D", "N", "N"), "Loss against training tokens; dashed: the law at each size. "
             "The star is the prediction for the main model with its 95 % interval.", runs, x="training tokens", y=loss, log_x=True),
        draw(figures.plot, folder, "law-parameters", against("N", "D", "D"), "The same against parameters; dashed: the law at each token "
             "budget.", runs, x=f"parameters ({s.config.get('parameters', 'N')})", y=loss, log_x=True),
        draw(figures.plot, folder, "law-check", check, "The law against what was measured; on the dotted line they agree. Ladder runs "
             "were fitted, the main model was not.", runs, x=f"measured {loss}", y=f"{loss} by the law", diagonal=True)]


def spaced(low: float, high: float, count: int = 40) -> list[float]:
    """Equal ratios from low to high."""
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]


def pretrain(stages: Stages, folder: Path) -> Told:
    s = stages["pretrain"]
    text = (f"The main model ({s.config['architecture']}, {s.config['num_layers']} layers of width {s.config['hidden_size']}, "
            f"{s.count('parameters')} parameters) was trained on {s.count('tokens')} tokens in {s.count('steps')} steps. Its held-out "
            f"loss is {s.short_form('heldout_loss', LOSS)} nats a token, measured on {s.n('heldout_loss')} tokens, its next-token "
            f"accuracy {s.value('heldout_accuracy', SHARE)}.")
    source = [s.cite("metrics.jsonl")]
    loss = [*s.series("training", "train/loss", "tokens"), *s.series("held out", "heldout/loss", "tokens")]
    drawn = [draw(figures.plot, folder, "pretrain-loss", loss, "Loss of the main model on its training batches and on held-out text.",
                  source, x="training tokens", y="loss (nats a token)", log_y=True),
             draw(figures.plot, folder, "pretrain-accuracy", s.series("", "heldout/accuracy", "tokens"),
                  "Held-out next-token accuracy over training.", source, x="training tokens", y="next-token accuracy", y_range=(0, 1))]
    log = s.path / "metrics.jsonl"
    tables = [Table(["tokens", "held-out loss", "accuracy"], [
        [f"{r['tokens']:,}", *(number(form.text(r[key]), f"{log}#{r['step']}/{key}") for key, form in
                               (("heldout/loss", LOSS), ("heldout/accuracy", SHARE)))]
        for r in read_metrics(log) if "heldout/loss" in r], "Held-out loss over training, on fewer rows than at the end.", source,
        folded=True)]
    if kinds := [key.split("/", 1)[1] for key in s.manifest.metrics if key.startswith("heldout_loss/")]:
        tables.append(Table(["kind of text", "loss", "95 % interval", "n", "accuracy"], [
            [*s.row(kind, f"heldout_loss/{kind}", LOSS), s.value(f"heldout_accuracy/{kind}", SHARE)] for kind in kinds],
            "Held-out loss by kind of text, which the mean hides.", [s.cite()]))
    return Section("pretrain", TITLES["pretrain"], [text], drawn, tables), []


def costs(stages: Stages) -> Section:
    total = sum(s.provenance["wall_s"] for s in stages.values())
    rows = []
    for name, s in stages.items():
        p = s.provenance
        shown = (("wall_s", clock(p["wall_s"])), ("wall_s", f"{p['wall_s'] / max(total, 1e-9) * 100:.0f} %"),
                 ("peak_rss_bytes", f"{p['peak_rss_bytes'] / 2**30:.2f} GiB"), ("world_size", str(p.get("world_size", MISSING))),
                 ("attempts", str(p.get("attempts", MISSING))))
        rows.append([name, *(number(t, s.origin("provenance", key)) for key, t in shown), s.count("tokens"), s.count("flops")])
    flops = sum(s.counts.get("flops", 0) for s in stages.values())
    rows.append(["sum", number(clock(total), "sum of provenance/wall_s"), "", "", "", "", "",
                 number(f"{flops:.3g}", "sum of counts/flops, where counted")])
    text = (f"On {hardware(stages)}. Tokens are those a stage trained on or generated, as its manifest counts them; memory is the peak of "
            "the main process. Money and energy: not measured.")
    again = [name for name, s in stages.items() if s.provenance.get("attempts", 1) > 1]
    late = [f"Interrupted and continued, so that the time is that of the last attempt alone: {', '.join(again)}."] if again else []
    return Section("costs", "Time, memory and cost", [text, *late], tables=[
        Table(["stage", "time", "share", "peak memory", "processes", "attempts", "tokens", "FLOPs"], rows, "What each stage took.",
              [s.cite() for s in stages.values()])])


def hardware(stages: Stages) -> str:
    return "; ".join(dict.fromkeys(s.provenance.get("hardware", "hardware not recorded") for s in stages.values()))


def records(stages: Stages) -> Section:
    rows = [[name, str(s.path / MANIFEST), s.short, s.commit, str(s.data["seed"]), s.provenance["started"][:16].replace("T", " "),
             ", ".join(f"{k} {v}" for k, v in s.provenance.get("versions", {}).items() if k in ("torch", "transformers", "trl"))]
            for name, s in stages.items()]

    def hashes(of: Mapping[str, str]) -> str:
        return ", ".join(f"{foreign(name)} {short_hash(value)}" for name, value in of.items()) or "-"

    lineage = [[name, s.short, hashes(s.data.get("parents", {})), settings_hash(s), hashes(s.data.get("inputs", {})),
                hashes({product: of["sha256"] for product, of in s.data.get("products", {}).items()}), s.commit]
               for name, s in stages.items()]
    tables = [
        Table(["stage", "manifest", "fingerprint", "commit", "seed", "started (UTC)", "versions"], rows, "The runs of this report.", []),
        Table(["stage", "fingerprint", "parents", "settings", "data from outside", "products", "commit"], lineage,
              "Lineage: the first 12 digits of SHA-256 hashes. A fingerprint is that of the stage's settings, of its parents' fingerprints "
              "and of the data from outside; a product's hash is that of its files.", [], stack=True)]
    return Section("records", "Where every number comes from", [
        "Each manifest holds the resolved config, the seed, the hashes of data and parents, and the metrics. Point at a number on the page "
        "to see the file and key that hold it, or what it was computed from."], tables=tables)


def settings_hash(s: Stage) -> str:
    """Of the settings that can change the numbers, as the fingerprint has them; older manifests do not hold them apart."""
    return short_hash(hash_data(s.data["identity"]["config"])) if "identity" in s.data else "not recorded"
