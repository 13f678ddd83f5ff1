"""What a recipe's finished stages did and what came out, told from their manifests alone: the sections of the report.

Every number is marked with the file and key that hold it, or with what it was computed from. What no manifest holds reads
"not measured"; nothing is filled in. A section function takes the finished stages by name and the folder for its figures, and
returns the section with its lines of the summary: effect, result, 95 % interval, n, and what stands beside it.
"""
import datetime
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stages.run import figures
from stages.run.checkpoint import read_metrics
from stages.run.console import clock
from stages.run.figures import Series
from stages.run.manifest import MANIFEST, Manifest
from stages.run.page import Figure, Page, Section, Table, number

MISSING = "not measured"
STRATEGIES = {"direct": "direct", "few_shot": "few-shot", "zero_shot_cot": "CoT", "few_shot_cot": "few-shot CoT",
              "sampled_cot": "one sampled CoT", "self_consistency": "self-consistency"}
MODELS = {"base": "base", "base_chat": "base in chat form", "sft": "SFT", "ppo": "PPO"}
Told = tuple[Section, list[list[str]]]


class Form(NamedTuple):
    """How a number is written."""

    digits: int = 3
    scale: float = 1.0
    sign: str = ""
    unit: str = ""

    def bare(self, value: float) -> str:
        return f"{round(value * self.scale, self.digits) + 0.0:{self.sign}.{self.digits}f}"  # + 0.0: never "-0.0"

    def text(self, value: float) -> str:
        return self.bare(value) + self.unit

    def between(self, ends: Iterable[float]) -> str:
        return "[{}, {}]".format(*map(self.bare, ends))


LOSS, SCORE, CHANGE = Form(4), Form(3), Form(3, sign="+")
SHARE, GAIN, ERROR = Form(1, 100, unit=" %"), Form(1, 100, "+", " points"), Form(1, 100, "+", " %")


class Stage:
    """A finished stage, and how the report cites it."""

    def __init__(self, manifest: Manifest):
        self.manifest, self.data, self.path = manifest, manifest.data, manifest.path
        self.config, self.notes, self.provenance = manifest.config, manifest.data.get("notes", {}), manifest.data["provenance"]
        self.counts, self.fingerprint = manifest.counts, manifest.fingerprint

    def cite(self, *files: str) -> str:
        """Manifest (and other files of the run), fingerprint, commit, seed: what the small line under a figure says."""
        return (f"{', '.join([str(self.path / MANIFEST), *files])} · {self.data['stage']} {self.short} · commit {self.commit} · "
                f"seed {self.data['seed']}")

    @property
    def short(self) -> str:
        return self.fingerprint.removeprefix("sha256:")[:12]

    @property
    def commit(self) -> str:
        commit = self.provenance.get("commit")
        return (commit[:10] if commit else "not recorded") + (" with uncommitted changes" if self.provenance.get("dirty") else "")

    def origin(self, *keys: str) -> str:
        return f"{self.path / MANIFEST}#{'/'.join(keys)}"

    def get(self, key: str) -> dict[str, Any] | None:
        return self.manifest.metrics.get(key)

    def value(self, key: str, form: Form = SCORE) -> str:
        found = self.get(key)
        return number(form.text(found["value"]), self.origin("metrics", key, "value")) if found else MISSING

    def interval(self, key: str, form: Form = SCORE) -> str:
        found = self.get(key)
        if not found:
            return MISSING
        return number(form.between(found["ci95"]), self.origin("metrics", key, "ci95")) if "ci95" in found else "no interval"

    def n(self, key: str) -> str:
        found = self.get(key)
        return number(f"{found['n']:,}", self.origin("metrics", key, "n")) if found and "n" in found else MISSING

    def full(self, key: str, form: Form = SCORE) -> str:
        """`0.457 [0.451, 0.464], n 192,055`."""
        found = self.get(key)
        if not found:
            return MISSING
        return self.value(key, form) + (f" {self.interval(key, form)}" if "ci95" in found else "") + (
            f", n {self.n(key)}" if "n" in found else "")

    def bar(self, key: str) -> figures.Bar | None:
        found = self.get(key)
        return (found["value"], *found.get("ci95", (None, None))) if found else None

    def count(self, key: str) -> str:
        found = self.counts.get(key)
        if found is None:
            return MISSING
        return number(f"{found:,}" if found < 1e9 else figures.short(found), self.origin("counts", key))

    def note(self, text: Any, key: str) -> str:
        return number(f"{text:,}" if isinstance(text, int) else str(text), self.origin("notes", key))

    def logged(self, key: str, x: str = "step") -> tuple[list[float], list[float]]:
        rows = [row for row in read_metrics(self.path / "metrics.jsonl") if key in row and x in row]
        return [row[x] for row in rows], [row[key] for row in rows]

    def series(self, label: str, key: str, x: str = "step", **look: Any) -> list[Series]:
        xs, ys = self.logged(key, x)
        return [Series(label, xs, ys, **look)] if xs else []


Stages = Mapping[str, Stage]


def verdict(ends: Iterable[float]) -> str:
    low, high = ends
    return "above zero" if low > 0 else "below zero" if high < 0 else "not distinguishable from zero"


def row(stage: Stage, label: str, key: str, form: Form = SCORE) -> list[str]:
    return [label, stage.value(key, form), stage.interval(key, form), stage.n(key)]


MEASURED = ["", "value", "95 % interval", "n"]


def prepare(stages: Stages, folder: Path) -> Told:
    s = stages["prepare"]
    dropped = "; ".join(f"{s.note(n, f'dropped/{why}')} for: {why}" for why, n in s.notes.get("dropped", {}).items()) or "none"
    text = (f"{s.count('documents')} documents were kept, {s.value('kept_share', SHARE)} of {s.n('kept_share')} read (left out: {dropped}). "
            f"A tokenizer of {s.count('vocabulary')} tokens was trained on them and the text packed into rows of "
            f"{s.note(s.notes.get('row_length', MISSING), 'row_length')} tokens. Held-out documents are chosen by their hash.")
    parts = [part for part in ("train-easy", "train", "heldout") if f"{part}_tokens" in s.counts]
    tables = [Table(["part", "documents", "tokens", "rows"], [
        [part, *(s.count(f"{part}_{what}") for what in ("documents", "tokens", "rows"))] for part in parts],
        "What the models are trained and measured on.", [s.cite()])]
    kinds = s.notes.get("kinds", {})
    if len(kinds) > 1:
        tables.append(Table(["kind of text", "documents"], [[k, s.note(n, f"kinds/{k}")] for k, n in
                                                            sorted(kinds.items(), key=lambda item: -item[1])],
                            "Documents of each kind, training and held out together.", [s.cite()]))
    return Section("prepare", "Data", [text], tables=tables), []


def scaling(stages: Stages, folder: Path, law: Callable[..., Any]) -> Told:
    """`law(constants, N, D)` is the form that was fitted (stages.laws.fit)."""
    s, main = stages["scaling"], stages.get("pretrain")
    fit, prediction = (json.loads(s.manifest.product(name).read_text(encoding="utf-8")) for name in ("fit", "prediction"))
    lines = s.manifest.product("points").read_text(encoding="utf-8").splitlines()
    points = sorted(map(json.loads, lines), key=lambda p: (p["N"], p["D"]))
    constants = [fit[name] for name in ("E", "A", "B", "alpha", "beta")]
    sizes, budgets = (sorted({p[key] for p in points}) for key in ("N", "D"))
    key = prediction["loss"]
    measured = main.get(key) if main and main.counts.get("tokens") == prediction["D"] else None
    held = "held-out loss (nats a token)" if key == "heldout_loss" else f"{key} (nats a token)"

    origin = str(s.manifest.product("fit"))
    form = " + ".join([number(f"{fit['E']:.3f}", f"{origin}#E"), number(f"{fit['A']:.3g}", f"{origin}#A") + " / N^"
                       + number(f"{fit['alpha']:.3f}", f"{origin}#alpha"), number(f"{fit['B']:.3g}", f"{origin}#B") + " / D^"
                       + number(f"{fit['beta']:.3f}", f"{origin}#beta")])
    text = (f"{s.count('runs')} runs of {len(sizes)} sizes and {len(budgets)} token budgets, each with its own full schedule, determine the "
            f"law L = {form} (N: {fit['conventions'].get('N', MISSING)}; D: training tokens). For the main model it predicts "
            f"{s.full('predicted_loss', LOSS)} runs.")
    check = (f"Fitted on the cheaper runs only, it is off by {s.value('holdout_error', SHARE)} on average on the {s.n('holdout_error')} "
             f"dearest, of which {s.value('holdout_coverage', SHARE)} lie inside their 95 % intervals.")
    bound = [f"Trust no prediction far from these runs: {', '.join(fit['at_bound'])} lies at the bound of what was tried, so the runs "
             "do not determine it."] if fit.get("at_bound") else []

    ladder, training = [], []
    shown = [*points, *([{"run": None}] if main else [])]
    for p in shown:
        run = s.path / p["run"] if p["run"] else main.path if main else s.path
        color = sizes.index(p["N"]) if p["run"] else len(sizes)
        first = not p["run"] or p["D"] == budgets[0]
        label = (f"N = {figures.short(p['N'])}" if p["run"] else "main model") if first else ""
        for curves, name in ((ladder, "heldout/loss"), (training, "train/loss")):
            rows = [r for r in read_metrics(run / "metrics.jsonl") if name in r and "tokens" in r]
            if rows:
                curves.append(Series(label, [r["tokens"] for r in rows], [r[name] for r in rows], color=color))
    star = len(sizes)
    ahead = [Series("predicted", [prediction["D"]], [prediction["value"]], [prediction["interval"][0]], [prediction["interval"][1]],
                    "star", star)]
    after = [Series("main model, measured", [prediction["D"]], [measured["value"]], look="points", color=star + 1)] if measured else []
    grid = spaced(budgets[0], 1.3 * max(prediction["D"], budgets[-1]))
    tokens = [Series(f"N = {figures.short(N)}", [p["D"] for p in points if p["N"] == N], [p["loss"] for p in points if p["N"] == N],
                     look="points", color=i) for i, N in enumerate(sizes)]
    tokens += [Series("", grid, [float(law(constants, N, D)) for D in grid], look="dashed", color=i)
               for i, N in enumerate([*sizes, prediction["N"]])]
    grid = spaced(sizes[0], 1.3 * max(prediction["N"], sizes[-1]))
    parameters = [Series(f"D = {figures.short(D)}", [p["N"] for p in points if p["D"] == D], [p["loss"] for p in points if p["D"] == D],
                         look="points", color=i) for i, D in enumerate(budgets)]
    parameters += [Series("", grid, [float(law(constants, N, D)) for N in grid], look="dashed", color=i)
                   for i, D in enumerate([*budgets, prediction["D"]])]
    at_size = [s_._replace(x=[prediction["N"]], color=len(budgets) + i) for i, s_ in enumerate([*ahead, *after])]
    fitted = Series("ladder", [p["loss"] for p in points], [float(law(constants, p["N"], p["D"])) for p in points], look="points")
    against = [Series("main model", [measured["value"]], *[[v] for v in (prediction["value"], *prediction["interval"])], "star", 1)
               ] if measured else []
    runs = [s.cite("fit.json", "prediction.json", "points.jsonl"), *([main.cite()] if main else [])]
    logs = [s.cite("*/metrics.jsonl"), *([main.cite("metrics.jsonl")] if main else [])]
    drawn = [
        Figure(save(figures.plot, folder / "ladder-heldout.svg", ladder, x="training tokens", y="held-out loss", log_x=True, log_y=True),
               "Held-out loss over training of every run of the ladder and of the main model.", logs),
        Figure(save(figures.plot, folder / "ladder-training.svg", training, x="training tokens", y="training loss", log_x=True, log_y=True),
               "Training loss of the same runs. It starts low where training begins with easy text.", logs),
        Figure(save(figures.plot, folder / "law-tokens.svg", [*tokens, *ahead, *after], x="training tokens", y=held, log_x=True),
               "Loss against training tokens; dashed: the law. The star is the prediction for the main model with its 95 % interval.", runs),
        Figure(save(figures.plot, folder / "law-parameters.svg", [*parameters, *at_size], x=f"parameters ({s.config.get('parameters', 'N')})",
                    y=held, log_x=True), "The same against parameters; dashed: the law at each token budget.", runs),
        Figure(save(figures.plot, folder / "law-check.svg", [fitted, *against], x="measured loss", y="loss by the law", diagonal=True),
               "The law against what was measured. Ladder runs were fitted; the main model was not.", runs)]
    table = Table(["run", "N", "D", "loss", "by the law", "off by"], [
        [p["run"], f"{p['N']:,}", f"{p['D']:,}", *(number(t, f"{s.manifest.product('points')}#{p['run']}") for t in (
            f"{p['loss']:.4f}", f"{float(law(constants, p['N'], p['D'])):.4f}",
            ERROR.text(float(law(constants, p["N"], p["D"])) / p["loss"] - 1)))] for p in points],
        "Every run of the ladder.", runs[:1])
    letters = Table(MEASURED, [row(s, name, name, Form(3 if name in ("E", "alpha", "beta") else 2)) for name in ("E", "A", "B", "alpha", "beta")],
                    "The law's constants; intervals are those of a residual bootstrap.", runs[:1])
    paragraphs = [text + (" " + check if s.get("holdout_error") else ""), *bound]
    lines = []
    if main:
        paragraphs.append(compared(s, main, prediction, measured, key))
        error = number(ERROR.text(prediction["value"] / measured["value"] - 1), f"{s.manifest.product('prediction')}#value over "
                       f"{main.origin('metrics', key, 'value')}") if measured else MISSING
        lines = [["Held-out loss of the main model against its prediction", f"off by {error}" if measured else MISSING,
                  s.interval("predicted_loss", LOSS) + " predicted", main.n(key) if measured else MISSING,
                  f"predicted {s.value('predicted_loss', LOSS)}, measured {main.value(key, LOSS) if measured else MISSING}; "
                  + ("written down before training" if before_training(prediction, main) else "not written before this training began")]]
    return Section("scaling", "Scaling law", paragraphs, drawn, [table, letters]), lines


def before_training(prediction: Mapping[str, Any], main: Stage) -> bool:
    """Whether the main model's run recorded this very prediction as its forecast, made before it started."""
    forecast = main.notes.get("forecast") or {}
    written = prediction.get("written")
    return bool(written) and forecast.get("value") == prediction["value"] and (
        datetime.datetime.fromisoformat(written) <= datetime.datetime.fromisoformat(main.provenance["started"]))


def compared(s: Stage, main: Stage, prediction: Mapping[str, Any], measured: Mapping[str, Any] | None, key: str) -> str:
    if measured is None:
        return "The main model has no figure to hold against the prediction: it was trained on another budget, or its loss was not measured."
    inside = prediction["interval"][0] <= measured["value"] <= prediction["interval"][1]
    when = ("The prediction was written down before the main model was trained." if before_training(prediction, main) else
            "The prediction was not on record when the main model's training began, so this is a check of the law, not a forecast.")
    error = number(ERROR.text(prediction["value"] / measured["value"] - 1),
                   f"{s.manifest.product('prediction')}#value over {main.origin('metrics', key, 'value')}")
    return (f"Measured afterwards: {main.full(key, LOSS)} tokens. The prediction is off by {error}, and what was measured lies "
            f"{'inside' if inside else 'outside'} its 95 % interval. {when}")


def spaced(low: float, high: float, count: int = 40) -> list[float]:
    """Equal ratios from low to high."""
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]


def save(draw: Callable[..., Path], path: Path, *content: Any, **options: Any) -> str:
    """Draw and return the name that the page uses: relative to the report."""
    draw(path, *content, **options)
    return f"{path.parent.name}/{path.name}"


def pretrain(stages: Stages, folder: Path) -> Told:
    s = stages["pretrain"]
    c = s.config
    text = (f"The main model ({c['architecture']}, {c['num_layers']} layers of width {c['hidden_size']}, {s.count('parameters')} parameters) "
            f"was trained on {s.count('tokens')} tokens in {s.count('steps')} steps. Its held-out loss is {s.full('heldout_loss', LOSS)} "
            f"tokens (nats a token), its next-token accuracy {s.value('heldout_accuracy', SHARE)}.")
    source = [s.cite("metrics.jsonl")]
    drawn = [Figure(save(figures.plot, folder / "pretrain-loss.svg", [*s.series("training", "train/loss", "tokens"),
                                                                      *s.series("held out", "heldout/loss", "tokens")],
                         x="training tokens", y="loss (nats a token)", log_y=True),
                    "Loss of the main model on its training batches and on held-out text.", source),
             Figure(save(figures.plot, folder / "pretrain-accuracy.svg", s.series("", "heldout/accuracy", "tokens"),
                         x="training tokens", y="next-token accuracy", y_range=(0, 1)), "Held-out next-token accuracy over training.", source)]
    held = [r for r in read_metrics(s.path / "metrics.jsonl") if "heldout/loss" in r]
    log = f"{s.path / 'metrics.jsonl'}#"
    tables = [Table(["tokens", "held-out loss", "accuracy"], [
        [f"{r['tokens']:,}", number(f"{r['heldout/loss']:.4f}", f"{log}{r['step']}/heldout/loss"),
         number(SHARE.text(r["heldout/accuracy"]), f"{log}{r['step']}/heldout/accuracy")] for r in held],
        "Held-out loss over training (on fewer rows than the final figure).", source)]
    kinds = [key.split("/", 1)[1] for key in s.manifest.metrics if key.startswith("heldout_loss/")]
    if kinds:
        rows = [[k, s.value(f"heldout_loss/{k}", LOSS), s.interval(f"heldout_loss/{k}", LOSS), s.value(f"heldout_accuracy/{k}", SHARE),
                 s.n(f"heldout_loss/{k}")] for k in ("", *kinds) if k]
        tables.append(Table(["kind of text", "loss", "95 % interval", "accuracy", "tokens"], rows,
                            "Held-out loss by kind of text: what a mean over all of it hides.", [s.cite()]))
    return Section("pretrain", "Pretraining", [text], drawn, tables), []


def sft(stages: Stages, folder: Path) -> Told:
    s = stages["sft"]
    how = f"LoRA of rank {s.config['lora_rank']}" if s.config.get("method") == "lora" else "all weights"
    text = (f"The pretrained model was tuned on {s.count('dialogues')} dialogues ({how}). Validation loss ends at "
            f"{s.full('validation_loss', LOSS)} dialogues, {s.value('validation_gap', Form(4, sign='+'))} above the training loss. Answers "
            f"that end by themselves: {s.value('before/stop_rate', SHARE)} before, {s.full('after/stop_rate', SHARE)} after; in format: "
            f"{s.value('before/format_rate', SHARE)} before, {s.full('after/format_rate', SHARE)} after.")
    base = [s.get(f"{when}/base_loss") for when in ("before", "after")]
    forgot = []
    if base[0] and base[1]:
        change = number(CHANGE.text(base[1]["value"] - base[0]["value"]), f"{s.origin('metrics', 'after/base_loss')} minus before/base_loss")
        forgot = [f"Forgetting: the loss on held-out text of the base corpus went from {s.value('before/base_loss', LOSS)} "
                  f"{s.interval('before/base_loss', LOSS)} to {s.value('after/base_loss', LOSS)} {s.interval('after/base_loss', LOSS)} "
                  f"({change} nats a token)."]
    names = {"format_rate": "in format", "stop_rate": "ends by itself", "worked_accuracy": "right, worked", "direct_accuracy": "right, direct"}
    both = {label: {when: s.bar(f"{when}/{key}") for when in ("before", "after")} for key, label in names.items()}
    drawn = [Figure(save(figures.plot, folder / "sft-loss.svg", [*s.series("training", "train/loss"), *s.series("validation", "eval/loss")],
                         x="step", y="loss (nats a token)", log_y=True), "Training and validation loss: a gap that widens is overfitting.",
                    [s.cite("metrics.jsonl")]),
             Figure(save(figures.bars, folder / "sft-answers.svg", both, x="share of greedy answers to validation problems", x_range=(0, 1.02)),
                    "The same problems before and after, with 95 % Wilson intervals.", [s.cite()])]
    if forgot:
        drawn.append(Figure(save(figures.bars, folder / "sft-forgetting.svg", {w: {"": s.bar(f"{w}/base_loss")} for w in ("before", "after")},
                                 x="held-out loss of the base corpus (nats a token)"), "Forgetting, with 95 % intervals.", [s.cite()]))
    forms = dict.fromkeys(names, SHARE) | {"base_loss": LOSS}
    table = Table(["", "before", "95 % interval", "after", "95 % interval", "n"], [
        [(names | {"base_loss": "base corpus, held-out loss"})[key], *(t for when in ("before", "after") for t in (
            s.value(f"{when}/{key}", form), s.interval(f"{when}/{key}", form))), s.n(f"after/{key}")] for key, form in forms.items()],
        "Before and after fine-tuning.", [s.cite()])
    line = ["Answers end by themselves after SFT", s.value("after/stop_rate", SHARE), s.interval("after/stop_rate", SHARE),
            s.n("after/stop_rate"), f"before: {s.value('before/stop_rate', SHARE)}; in format after: {s.value('after/format_rate', SHARE)}"]
    return Section("sft", "Supervised fine-tuning", [text, *forgot], drawn, [table]), [line]


def annotator(stages: Stages) -> str:
    """Who ranked, in words; simulated annotators are called so."""
    s = stages.get("preferences")
    if s is None or "simulated" not in s.notes:
        return "an annotator whom no manifest names"
    names = ", ".join(s.notes.get("annotators", [])) or "unnamed"
    return f"a simulated annotator ({names}), not by people" if s.notes["simulated"] else f"people ({names})"


def preferences(stages: Stages, folder: Path) -> Told:
    s = stages["preferences"]
    asked = f"{s.count('samples')} responses to {s.count('asked')} prompts were sampled from the SFT model at temperature " \
            f"{s.config.get('temperature', MISSING)}; " if "samples" in s.counts else f"Of {s.count('asked')} rows of {s.config.get('source')}, "
    text = (f"{asked}{s.count('responses')} responses to {s.count('prompts')} prompts are in the set ({s.count('pairs')} pairs of different "
            f"rank), ranked by {annotator(stages)}.")
    names = (("kept_share", "prompts kept", SHARE), ("all_tie_share", "prompts left out: all responses tie", SHARE),
             ("annotator_flipped_pairs", "pairs judged against the gold score", SHARE), ("sample_accuracy", "samples with the right answer", SHARE),
             ("gold_mean", "gold score of a sample", SCORE), ("distinct_responses", "distinct responses a prompt", Form(2)))
    counts = [[label, s.count(key)] for key, label in (
        ("asked", "prompts or rows asked for"), ("samples", "responses sampled"), ("prompts", "prompts with a ranking"), ("responses", "ranked responses"),
        ("pairs", "pairs of different rank"), ("all_tied", "left out: all tied"), ("too_long", "left out: too long"),
        ("prompts_differ", "left out: two prompts in one row"), ("tokens", "tokens")) if key in s.counts]
    tables = [Table(["", "count"], counts, f"Preferences, ranked by {annotator(stages)}.", [s.cite()])]
    if rows := [row(s, label, key, form) for key, label, form in names if s.get(key)]:
        tables.append(Table(MEASURED, rows, "What was sampled and how it was judged.", [s.cite()]))
    return Section("preferences", "Preferences", [text], tables=tables), []


def reward_model(stages: Stages, folder: Path) -> Told:
    s = stages["reward_model"]
    fresh, base = s.full("fresh_accuracy", SHARE), s.value("baseline_min_logprob_accuracy", SHARE)
    gain = s.get("gain_over_min_logprob")
    text = (f"Trained on {s.count('train_responses')} responses to {s.count('train_prompts')} prompts, ranked by {annotator(stages)}. It orders "
            f"{s.full('heldout_accuracy', SHARE)} held-out pairs as the annotator does, and {fresh} pairs of fresh SFT samples as the gold "
            f"score does; the SFT model's own least token log-probability reaches {base} there, response length "
            f"{s.value('baseline_length_accuracy', SHARE)}.")
    lead = [f"Gain over the log-probability baseline on the same pairs: {s.full('gain_over_min_logprob', GAIN)} pairs "
            f"({verdict(gain['ci95'])})."] if gain else []
    distances = sorted({int(key.rsplit("_", 1)[1]) for key in s.manifest.metrics if "_accuracy_distance_" in key})
    near = {f"distance {d}": {label: s.bar(f"{name}_accuracy_distance_{d}") for name, label in
                              (("heldout", "held-out prompts"), ("fresh", "fresh samples")) if s.get(f"{name}_accuracy")} for d in distances}
    judges = {"reward model": {"": s.bar("fresh_accuracy")}, "least log-probability": {"": s.bar("baseline_min_logprob_accuracy")},
              "length": {"": s.bar("baseline_length_accuracy")}}
    drawn = []
    if curves := [*s.series("training", "train/accuracy"), *s.series("held out", "eval/accuracy")]:
        drawn.append(Figure(save(figures.plot, folder / "reward-training.svg", curves, x="step", y="pairwise accuracy"),
                            "Pairs ordered as the annotator ordered them, over training.", [s.cite("metrics.jsonl")]))
    if near:
        drawn.append(Figure(save(figures.bars, folder / "reward-distance.svg", near, x="pairwise accuracy", x_range=(0, 1.02),
                                 marks={"chance": 0.5}), "Accuracy by how far apart two responses are ranked, with 95 % intervals.", [s.cite()]))
    if s.get("fresh_accuracy"):
        drawn.append(Figure(save(figures.bars, folder / "reward-baselines.svg", judges, x="pairwise accuracy on fresh SFT samples",
                                 x_range=(0, 1.02), marks={"chance": 0.5}), "The reward model beside judges that cost nothing.", [s.cite()]))
    labels = {"heldout_accuracy": "held-out pairs", "fresh_accuracy": "pairs of fresh SFT samples",
              "baseline_min_logprob_accuracy": "baseline: least token log-probability", "baseline_length_accuracy": "baseline: length"}
    rows = [row(s, label, key, SHARE) for key, label in labels.items()]
    rows += [row(s, f"{label}, rank distance {d}", f"{name}_accuracy_distance_{d}", SHARE) for name, label in
             (("heldout", "held-out pairs"), ("fresh", "fresh pairs")) for d in distances if s.get(f"{name}_accuracy_distance_{d}")]
    rows += [row(s, label, f"{name}_{key}") for name, at in (("heldout", "held out"), ("fresh", "fresh"))
             for key, label in (("ece", f"calibration error, {at}"), ("brier", f"Brier score, {at}")) if s.get(f"{name}_{key}")]
    table = Table(MEASURED, rows, "Intervals know that pairs of one prompt are related.", [s.cite()])
    line = ["Reward model on fresh SFT samples, pairwise accuracy", s.value("fresh_accuracy", SHARE), s.interval("fresh_accuracy", SHARE),
            s.n("fresh_accuracy"), f"log-probability baseline {base}" + (f"; gain {s.full('gain_over_min_logprob', GAIN)}" if gain else "")]
    return Section("reward_model", "Reward model", [text, *lead], drawn, [table]), [line]


PPO_ROWS = (("gold", "gold score", SCORE, CHANGE), ("score", "reward (proxy)", SCORE, CHANGE),
            ("sampled_accuracy", "sampled accuracy", SHARE, GAIN), ("greedy_accuracy", "greedy accuracy", SHARE, GAIN),
            ("entropy", "entropy (nats a token)", SCORE, CHANGE), ("kl", "KL to the SFT model (nats a response)", SCORE, CHANGE),
            ("length", "length (tokens)", Form(1), Form(1, sign="+")), ("eos_rate", "ends by itself", SHARE, GAIN))


def ppo(stages: Stages, folder: Path) -> Told:
    s = stages["ppo"]
    a_step = s.config.get("epochs", 1) * s.config.get("minibatches", 1)
    reward = ", ".join(f"{weight:g} x {name}" for name, weight in s.config.get("reward", {}).items()) or MISSING
    text = (f"{s.count('responses')} responses in {s.config.get('iterations', MISSING)} iterations, scored by {reward} (`model`: the reward "
            f"model, learned from rankings by {annotator(stages)}), with a price of {s.config.get('kl_coef', MISSING)} a nat of KL. On "
            f"{s.n('gain/gold')} validation problems the gold score rose by {s.value('gain/gold', CHANGE)} {s.interval('gain/gold', CHANGE)} "
            f"and the accuracy of sampled answers by {s.value('gain/sampled_accuracy', GAIN)} {s.interval('gain/sampled_accuracy', GAIN)}, at a "
            f"KL of {s.value('after/kl', Form(2))} nats a response.")
    paragraphs = [text]
    greedy, sampled, entropy = (s.get(f"gain/{key}") for key in ("greedy_accuracy", "sampled_accuracy", "entropy"))
    if greedy and sampled and entropy and "ci95" in greedy and "ci95" in entropy:
        reading = ("Greedy accuracy rose too, so it is more than a sharper distribution." if greedy["ci95"][0] > 0 else
                   "Greedy accuracy did not rise distinguishably while entropy fell: what was gained may be mere sharpening."
                   if entropy["ci95"][1] < 0 < sampled["value"] else "Greedy accuracy did not rise distinguishably.")
        paragraphs.append(f"Greedy accuracy: {s.value('gain/greedy_accuracy', GAIN)} {s.interval('gain/greedy_accuracy', GAIN)}; entropy: "
                          f"{s.value('before/entropy')} before, {s.value('after/entropy')} after. {reading}")

    last = s.config.get("iterations", 0)

    def over(*parts: tuple[str, str, str | None, int]) -> list[Series]:
        """Curves of (label, key in the log, key in the manifest, colour), with what was measured before and after as points."""
        found = []
        for label, key, measured, color in parts:
            if key:
                steps, ys = s.logged(key)
                found += [Series(label, [x / a_step for x in steps], ys, color=color)] if steps else []
            ends = [(x, b) for x, when in ((0, "before"), (last, "after")) if measured and (b := s.get(f"{when}/{measured}"))]
            if ends:
                low, high = ([b.get("ci95", (b["value"],) * 2)[i] for _, b in ends] for i in (0, 1))
                found.append(Series("" if key else label, [x for x, _ in ends], [b["value"] for _, b in ends], low, high, "points", color))
        return found

    source = [s.cite("metrics.jsonl")]
    charts = [
        ("ppo-scores", over(("reward (proxy)", "objective/score", "score", 0), ("gold score", "objective/gold", "gold", 1)), "mean score",
         "Reward and gold score of each iteration's samples. When the reward rises and gold falls, the reward model is being exploited. "
         "Points: validation problems before and after, with 95 % intervals."),
        ("ppo-accuracy", over(("sampled", "objective/accuracy", "sampled_accuracy", 0), ("greedy", "", "greedy_accuracy", 1)), "accuracy",
         "Accuracy of sampled answers over training; points: validation problems, sampled and greedy, before and after."),
        ("ppo-kl", over(("", "objective/kl", "kl", 0)), "KL (nats a response)", "Distance from the SFT model; points: validation problems."),
        ("ppo-entropy", over(("", "objective/entropy", "entropy", 0)), "entropy (nats a token)",
         "Entropy of the policy: mere sharpening shows as a fall without a gain in greedy accuracy."),
        ("ppo-response", over(("ends by itself", "response/eos_rate", "eos_rate", 0), ("clipped ratios", "policy/clip_fraction", None, 1),
                              ("explained variance", "value/explained_variance", None, 2)), "share", "Health of the training.")]
    drawn = [Figure(save(figures.plot, folder / f"{name}.svg", series, x="iteration", y=y), caption, source)
             for name, series, y, caption in charts if series]
    rows_ = [r for r in read_metrics(s.path / "metrics.jsonl") if "objective/kl" in r and "objective/gold" in r]
    if rows_:
        kl = [r["objective/kl"] for r in rows_]
        drawn.append(Figure(save(figures.plot, folder / "ppo-frontier.svg", [
            Series(label, kl, [r[key] for r in rows_], look="points") for label, key in
            (("reward (proxy)", "objective/score"), ("gold score", "objective/gold"))], x="KL (nats a response)", y="mean score"),
            "The same scores against the distance travelled: the over-optimisation view (Gao et al. 2023).", source))
    table = Table(["", "before", "after", "paired gain", "95 % interval", "n"], [
        [label, s.value(f"before/{key}", form), s.value(f"after/{key}", form), s.value(f"gain/{key}", gain), s.interval(f"gain/{key}", gain),
         s.n(f"gain/{key}")] for key, label, form, gain in PPO_ROWS],
        "Validation problems before and after PPO; gains are paired by problem.", [s.cite()])
    gold = s.get("gain/gold")
    lines = [["PPO's gain in gold score over SFT", s.value("gain/gold", CHANGE), s.interval("gain/gold", CHANGE), s.n("gain/gold"),
              (f"{verdict(gold['ci95'])}; " if gold and "ci95" in gold else "") + f"reward {s.value('gain/score', CHANGE)}; KL "
              f"{s.value('after/kl', Form(2))} nats a response"],
             ["PPO's gain in sampled accuracy over SFT", s.value("gain/sampled_accuracy", GAIN), s.interval("gain/sampled_accuracy", GAIN),
              s.n("gain/sampled_accuracy"), f"greedy accuracy {s.value('gain/greedy_accuracy', GAIN)} "
              f"{s.interval('gain/greedy_accuracy', GAIN)}; entropy {s.value('gain/entropy', CHANGE)}"]]
    return Section("ppo", "PPO", paragraphs, drawn, [table]), lines


def evaluation(stages: Stages, folder: Path) -> Told:
    s = stages["evaluation"]
    results = s.manifest.product("results")
    found = json.loads(results.read_text(encoding="utf-8"))
    cells = {(c["task"], c["strategy"], c["model"]): c for c in found["cells"]}
    tasks = list(dict.fromkeys(c["task"] for c in found["cells"]))
    c = s.config
    votes = c.get("num_samples", MISSING)
    text = (f"{s.count('cells')} cells of model, task and strategy, on problems that no stage was trained or tuned on. Few-shot prompts hold "
            f"{c.get('shots', MISSING)} examples; self-consistency takes the majority of {votes} chains at temperature "
            f"{c.get('temperature', MISSING)}, beside which stands what one such chain is worth; everything else is greedy. An answer that "
            "cannot be read is wrong; intervals of accuracies are Wilson's (of one sampled chain: a bootstrap over problems).")
    drawn: list[Figure] = []
    source = [s.cite("results.json")]
    asked = {(strategy, model) for model, chosen in c.get("models", {}).items() for strategy in chosen} | {k[1:] for k in cells}
    for task in tasks:
        bars_ = {label: {MODELS.get(m, m): interval_of(cells.get((task, strategy, m))) for m in MODELS if (strategy, m) in asked}
                 for strategy, label in STRATEGIES.items()}
        drawn.append(Figure(save(figures.bars, folder / f"accuracy-{task}.svg", {k: v for k, v in bars_.items() if v}, x="accuracy",
                                 x_range=(0, 1.02)), f"{task}: accuracy by strategy and model, with 95 % intervals.", source))
        bought = [Series(label, *([x[i] for x in shown] for i in (0, 1, 2, 3)), "points", place, [x[4] for x in shown])
                  for place, (model, label) in enumerate(MODELS.items()) if model != "base_chat" and (shown := [
                      (cell["tokens_mean"], *interval_of(cell), STRATEGIES.get(strategy, strategy))
                      for (t, strategy, m), cell in cells.items() if t == task and m == model])]
        drawn.append(Figure(save(figures.plot, folder / f"tokens-{task}.svg", bought, x="generated tokens a question", y="accuracy", log_x=True,
                                 y_range=(0, 1.02)), f"{task}: what each strategy buys for the tokens it generates.", source))
        model = next((m for m in ("sft", "ppo", "base") if any(k[0] == task and k[2] == m for k in cells)), "")
        harder = [Series(STRATEGIES[strategy], [float(d) for d in levels], *([f(levels[d]) for d in levels] for f in (
            lambda x: x["accuracy"], lambda x: x["wilson95"][0], lambda x: x["wilson95"][1])))
            for strategy in ("direct", "zero_shot_cot", "self_consistency")
            if len(levels := cells.get((task, strategy, model), {}).get("by_difficulty", {})) > 1]
        if harder:
            drawn.append(Figure(save(figures.plot, folder / f"difficulty-{task}.svg", harder, x="difficulty (steps)", y="accuracy", y_range=(0, 1.02)),
                                f"{task}: accuracy of the {MODELS[model]} model as problems need more steps.", source))
    rows = []
    for (task, strategy, model), cell in cells.items():
        def mark(text: str, key: str, where: str = f"{results}#{model}/{task}/{strategy}") -> str:
            return number(text, f"{where}/{key}")

        rows.append([MODELS.get(model, model), task, STRATEGIES.get(strategy, strategy), mark(SHARE.text(cell["accuracy"]), "accuracy"),
                     mark(SHARE.between(interval_of(cell)[1:]), "interval"), mark(f"{cell['n']:,}", "n"),
                     mark(SHARE.text(cell["unparsed"] / cell["num_samples"]), "unparsed over num_samples"),
                     mark(SHARE.text(cell["finished"]), "finished"), mark(f"{cell['tokens_mean']:.1f}", "tokens_mean")])
    pairs = [[pair_name(p), p["task"], *(number(t, f"{results}#{p['a']}-{p['b']}/{p['task']}") for t in (
        GAIN.text(p["difference"]), GAIN.between(p["ci95"]), f"{p['n']:,}", "none" if p["p"] is None else f"{p['p']:.2g}"))]
        for p in found["comparisons"]]
    tables = [Table(["model", "task", "strategy", "accuracy", "95 % interval", "n", "unreadable", "ends", "tokens a question"], rows,
                    "Every cell. Unreadable: samples without an answer; ends: samples that end by themselves.", source)]
    if pairs:
        tables.append(Table(["first minus second", "task", "difference", "95 % interval", "n", "McNemar p"], pairs,
                            "Paired comparisons on the same problems.", source))
    return Section("evaluation", "Evaluation", [text], drawn, tables), effects(found, cells, votes, results)


def interval_of(cell: Mapping[str, Any] | None) -> Any:
    """(value, low, high) of a cell, None without one."""
    return None if cell is None else (cell["accuracy"], *(cell.get("wilson95") or cell["bootstrap95"]))


def pair_name(p: Mapping[str, Any]) -> str:
    (m, a), (n, b) = p["a"].split("/"), p["b"].split("/")
    first, second = STRATEGIES.get(a, a), STRATEGIES.get(b, b)
    return f"{MODELS.get(m, m)}: {first} - {second}" if m == n else f"{first}: {MODELS.get(m, m)} - {MODELS.get(n, n)}"


def effects(found: Mapping[str, Any], cells: Mapping[tuple[str, str, str], Any], votes: Any, results: Path) -> list[list[str]]:
    """Summary lines: chain of thought over direct answers and what voting adds, of the SFT model (else the base model), by task."""
    wanted = (("zero_shot_cot", "direct", "CoT over direct answers"), ("self_consistency", "sampled_cot", f"{votes} votes over one sampled chain"),
              ("self_consistency", "zero_shot_cot", f"{votes} votes over greedy CoT"))
    lines = []
    for a, b, name in wanted:
        pairs = [p for p in found["comparisons"] if p["task"] != "all"
                 and (p["a"], p["b"]) in ((f"sft/{a}", f"sft/{b}"), (f"base/{a}", f"base/{b}"))]
        model = next((m for m in ("sft", "base") if any(p["a"].startswith(m + "/") for p in pairs)), "sft")
        for p in (p for p in pairs if p["a"].startswith(model + "/")):
            where = f"{results}#{p['a']}-{p['b']}/{p['task']}"
            sides = ", ".join(f"{STRATEGIES[k]} {number(SHARE.text(cells[p['task'], k, model]['accuracy']), f'{results}#{model}/{p["task"]}/{k}')}"
                              for k in (a, b))
            lines.append([f"{name}, {p['task']}, {MODELS[model]} model", number(GAIN.text(p["difference"]), where),
                          number(GAIN.between(p["ci95"]), where), number(f"{p['n']:,}", where), f"{sides}; {verdict(p['ci95'])}"])
    return lines


def costs(stages: Stages) -> Section:
    total = sum(s.provenance["wall_s"] for s in stages.values())
    rows = [[name, number(clock(s.provenance["wall_s"]), s.origin("provenance", "wall_s")), f"{s.provenance['wall_s'] / total:.0%}" if total else MISSING,
             number(f"{s.provenance['peak_rss_bytes'] / 2**30:.2f} GiB", s.origin("provenance", "peak_rss_bytes")), s.count("tokens"),
             s.count("flops"), number(str(s.provenance.get("world_size", MISSING)), s.origin("provenance", "world_size")),
             number(str(s.provenance.get("attempts", MISSING)), s.origin("provenance", "attempts"))] for name, s in stages.items()]
    again = [name for name, s in stages.items() if s.provenance.get("attempts", 1) > 1]
    text = (f"{number(clock(total), 'sum of provenance/wall_s over the manifests')} in all on {hardware(stages)}. Tokens are those a stage trained on "
            "or generated, as its manifest counts them; memory is the largest of the main process. Money and energy: not measured.")
    late = [f"Interrupted and continued: {', '.join(again)}; their times are those of the last attempt alone."] if again else []
    return Section("costs", "Time, memory and cost", [text, *late], tables=[
        Table(["stage", "time", "share", "peak memory", "tokens", "FLOPs", "processes", "attempts"], rows, "What each stage took.",
              [s.cite() for s in stages.values()])])


def hardware(stages: Stages) -> str:
    return "; ".join(dict.fromkeys(s.provenance.get("hardware", "hardware not recorded") for s in stages.values()))


def records(stages: Stages) -> Section:
    rows = [[name, str(s.path / MANIFEST), s.short, s.commit, str(s.data["seed"]), s.provenance["started"],
             ", ".join(f"{k} {v}" for k, v in s.provenance.get("versions", {}).items() if k in ("torch", "transformers", "trl"))]
            for name, s in stages.items()]
    return Section("records", "Where every number comes from", [
        "Each stage's manifest holds its resolved config, seed, the hashes of its data and of its parents, and its metrics. Point at a number on "
        "this page to see the file and key that hold it; a number computed from several names them."],
        tables=[Table(["stage", "manifest", "fingerprint", "commit", "seed", "started", "versions"], rows, "The runs of this report.", [])])


def warnings(stages: Stages) -> list[str]:
    """What could mislead: products of different pipelines side by side, code that no commit holds, a simulated annotator."""
    found = []
    for name, s in stages.items():
        for parent, fingerprint in s.data.get("parents", {}).items():
            if parent in stages and stages[parent].fingerprint != fingerprint:
                found.append(f"{name} was made from another {parent} ({fingerprint.removeprefix('sha256:')[:12]}) than the one shown here "
                             f"({stages[parent].short}): run make {name} again before reading them together.")
    dirty = [name for name, s in stages.items() if s.provenance.get("dirty")]
    if dirty:
        found.append(f"{', '.join(dirty)} ran with uncommitted changes, so their commit alone does not reproduce them.")
    commits = {s.provenance.get("commit") for s in stages.values()}
    if len(commits) > 1:
        found.append(f"The stages ran at {len(commits)} different commits; see the table at the end.")
    if "preferences" in stages and stages["preferences"].notes.get("simulated"):
        found.append(f"No person ranked anything here: the preferences are by {annotator(stages)}.")
    return found


def tell(stages: Stages, missing: Mapping[str, str], folder: Path, *, recipe: str, law: Callable[..., Any]) -> Page:
    """The report of `stages`, finished ones by name in the order of the pipeline; `missing` says what would make the others."""
    told: dict[str, Told] = {}
    for name, section in (("prepare", prepare), ("scaling", None), ("pretrain", pretrain), ("sft", sft), ("preferences", preferences),
                          ("reward_model", reward_model), ("ppo", ppo), ("evaluation", evaluation)):
        if name in stages:
            told[name] = section(stages, folder) if section else scaling(stages, folder, law)
        else:
            told[name] = Section(name, name.replace("_", " ").capitalize(), [f"Not in this report: {missing[name]}."]), []
    lines = [line for _, rows in told.values() for line in rows]
    seeds = sorted({s.data["seed"] for s in stages.values()})
    lead = (f"From raw text to an aligned, evaluated model: what each stage of the recipe \"{recipe}\" did and what came out, on {hardware(stages)}. "
            f"It is one run (seed {', '.join(map(str, seeds))}): intervals say what other problems or texts might have given, not what training "
            "with another seed would.")
    summary = Table(["effect", "result", "95 % interval", "n", "beside it"], lines, "What it shows." if lines else
                    "What it shows: nothing yet, no stage that would measure an effect has finished.", [s.cite() for s in stages.values()], stack=True)
    steps = [(name, clock(stages[name].provenance["wall_s"]) if name in stages else "") for name in told]
    return Page(f"Plumbline: {recipe}", lead, warnings(stages), steps, summary, [*(section for section, _ in told.values()), costs(stages), records(stages)])
