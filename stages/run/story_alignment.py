"""The report's sections on fine-tuning, preferences, reward model, PPO and evaluation."""
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reward.gate import judge
from stages.run import cited, figures, story_frontier, story_hacking
from stages.run.checkpoint import read_metrics
from stages.run.cited import (
    CHANGE,
    GAIN,
    LOSS,
    MEASURED,
    MISSING,
    MODELS,
    SCORE,
    SHARE,
    STRATEGIES,
    TITLES,
    Form,
    Stages,
    Told,
    annotator,
    draw,
    verdict,
)
from stages.run.figures import Series
from stages.run.names import called
from stages.run.page import Figure, Section, Table, number


def sft(stages: Stages, folder: Path) -> Told:
    s = stages["sft"]
    how = f"LoRA of rank {s.config['lora_rank']}" if s.config.get("method") == "lora" else "all weights"
    paragraphs = [
        f"The pretrained model was tuned on {s.count('dialogues')} dialogues ({how}). The validation loss is "
        f"{s.full('validation_loss', LOSS)} tokens with loss; "
        f"its gap to the training dialogues' loss is {s.value('validation_gap', Form(4, sign='+'))}. "
        f"Answers that end by themselves: {s.value('before/stop_rate', SHARE)} before, {s.full('after/stop_rate', SHARE)} after; in "
        f"format: {s.value('before/format_rate', SHARE)} before, {s.full('after/format_rate', SHARE)} after."]
    paragraphs += forgetting(s)
    if "kept_step" in s.counts:
        paragraphs.append(f"The product is the checkpoint of step {s.count('kept_step')} of {s.count('steps')}. Recommended is, of those "
                          "that learned as much as the best, the one that forgot least: the star below.")
    names = {key: called("sft", key) for key in ("format_rate", "stop_rate", "worked_accuracy", "direct_accuracy", *(
        key for key in ("plain/worked_accuracy", "instructions") if s.get(f"after/{key}")))}
    times = ("before", "after")
    drawn = [
        draw(figures.plot, folder, "sft-loss", [*s.series("training", "train/loss"), *s.series("validation", "eval/loss")],
             "Training and validation loss; a gap that widens is overfitting.", [s.cite("metrics.jsonl")], x="step",
             y="loss (nats a token)", log_y=True),
        draw(figures.bars, folder, "sft-answers", {label: {t: s.bar(f"{t}/{key}") for t in times} for key, label in names.items()},
             "Greedy answers to the same validation problems before and after, with 95 % Wilson intervals.", [s.cite()],
             x="share of answers", x_range=(0, 1.02)),
        draw(figures.bars, folder, "sft-forgetting", {t: {"": s.bar(f"{t}/base_loss")} for t in times},
             "Forgetting: loss on the base corpus before and after, with 95 % intervals.", [s.cite()], x="held-out loss (nats a token)")]
    looks = [row for row in read_metrics(s.path / "metrics.jsonl") if {"eval/loss", "forgetting/base_loss"} <= set(row) and row["step"]]
    if looks:
        chosen = s.manifest.data["notes"].get("recommended_step")
        points = [(row["forgetting/base_loss"], row["eval/loss"], row["step"] == chosen) for row in looks]
        drawn.append(draw(figures.plot, folder, "sft-verdict", [
            Series("looks, in the order of training", [x for x, _, _ in points], [y for _, y, _ in points], color=0),
            Series("recommended", [x for x, _, star in points if star], [y for _, y, star in points if star], look="star", color=1)],
            "Learning against forgetting at every look, on fewer rows than before and after: down is learned, right is forgotten.",
            [s.cite("metrics.jsonl")],
            x="loss on the base corpus (nats a token)", y="validation loss (nats a token)"))
    rows = [[label, *(cell for t in times for cell in (s.value(f"{t}/{key}", form), s.interval(f"{t}/{key}", form))), s.n(f"after/{key}")]
            for key, label, form in (*((key, label, SHARE) for key, label in names.items()),
                                     ("base_loss", called("sft", "base_loss"), LOSS))]
    table = Table(["", "before", "95 % interval", "after", "95 % interval", "n"], rows, "Before and after fine-tuning.", [s.cite()])
    line = [*s.row("SFT: answers end by themselves", "after/stop_rate", SHARE),
            f"before {s.value('before/stop_rate', SHARE)}; in format {s.value('before/format_rate', SHARE)} before, "
            f"{s.value('after/format_rate', SHARE)} after"]
    return Section("sft", TITLES["sft"], paragraphs, drawn, [table]), [line]


def preferences(stages: Stages, folder: Path) -> Told:
    s = stages["preferences"]
    asked = f"Of {s.count('asked')} rows of {s.config.get('source')}, " if s.config.get("source") else (
        f"{s.count('samples')} responses to {s.count('asked')} prompts were sampled from the SFT model at temperature "
        f"{s.config.get('temperature', MISSING)}. Of these, ")
    text = (f"{asked}{s.count('responses')} responses to {s.count('prompts')} prompts are in the set, in {s.count('pairs')} pairs of "
            f"different rank, ranked by {annotator(stages)}.")
    labels = {"asked": "prompts or rows looked at", "samples": "responses sampled", "prompts": "prompts with a ranking",
              "responses": "different responses, ranked", "pairs": "pairs of different rank", "all_tied": "left out: all responses tie",
              "too_long": "left out: too long", "prompts_differ": "left out: two prompts in one row",
              "empty_text": "left out: an empty response",
              "too_few_scored": "left out: fewer than two scores", "unscored_responses": "left out: responses without a score",
              "skipped": "skipped by annotators",
              "rankings": "rankings", "repeated": "rankings of what the same annotator had ranked", "duplicated": "of these the same again",
              "contradicting": "of these with a pair reversed", "tokens": "tokens"}
    tables = [Table(["", "count"], [[label, s.count(key)] for key, label in labels.items() if key in s.counts],
                    f"Preferences, ranked by {annotator(stages)}.", [s.cite()])]
    measured = [s.row(called("preferences", key), key, form) for key, form in (
        *((key, SHARE) for key in ("kept_share", "all_tie_share", "annotator_flipped_pairs", "agreement_alpha", "agreement_pairs",
                                   "first_shown_preferred", "longer_preferred", "changed_when_asked_again", "sample_accuracy")),
        ("gold_mean", SCORE), ("distinct_responses", Form(2))) if s.get(key)]
    if measured:
        tables.append(Table(MEASURED, measured, "What was sampled and how it was judged.", [s.cite()]))
    return Section("preferences", TITLES["preferences"], [text], tables=tables), []


def reward_model(stages: Stages, folder: Path) -> Told:
    s = stages["reward_model"]
    base, length = "baseline_min_logprob_accuracy", "baseline_length_accuracy"
    paragraphs = [
        f"Trained on {s.count('train_responses')} responses to {s.count('train_prompts')} prompts, ranked by {annotator(stages)}. Pairs "
        f"ordered right: {s.full('heldout_accuracy', SHARE)} on held-out prompts, where the annotator says what is right; "
        f"{s.full('fresh_accuracy', SHARE)} on fresh SFT samples, where the gold score does. There the SFT model's own least token "
        f"log-probability reaches {s.value(base, SHARE)}, response length {s.value(length, SHARE)}."]
    if s.get("gain_over_min_logprob"):
        paragraphs.append(f"Gain over the log-probability baseline on the same pairs: {s.short_form('gain_over_min_logprob', GAIN)}, "
                          f"{verdict(s.ends('gain_over_min_logprob'))}.")
    judged = judge(s.manifest.metrics)
    paragraphs.append(f"Held against the gate's own limits, its verdict is {judged.level}: the table of the gate says why.")
    distances = sorted({int(key.rsplit("_", 1)[1]) for key in s.manifest.metrics if "_accuracy_distance_" in key})
    sets = {name: label for name, label in (("heldout", "held-out prompts"), ("fresh", "fresh samples")) if s.get(f"{name}_accuracy")}
    drawn: list[Figure] = []
    if curves := [*s.series("training", "train/accuracy"), *s.series("held out", "heldout/accuracy")]:
        drawn.append(draw(figures.plot, folder, "reward-training", curves, "Pairs ordered as the annotator ordered them, over training.",
                          [s.cite("metrics.jsonl")], x="step", y="pairwise accuracy"))
    if distances:
        by_distance = {f"rank distance {d}": {label: s.bar(key) for name, label in sets.items()
                                              if s.get(key := f"{name}_accuracy_distance_{d}")} for d in distances}
        drawn.append(draw(figures.bars, folder, "reward-distance", by_distance, "Accuracy by how far apart two responses are ranked, with "
                          "95 % intervals.", [s.cite()], x="pairwise accuracy", x_range=(0, 1.02), marks={"chance": 0.5}))
    if "fresh" in sets:
        judges = {"reward model": "fresh_accuracy", "least log-prob.": base, "length": length}
        drawn.append(draw(figures.bars, folder, "reward-baselines", {label: {"": s.bar(key)} for label, key in judges.items()},
                          "The reward model beside judges that cost nothing, on fresh SFT samples.", [s.cite()], x="pairwise accuracy",
                          x_range=(0, 1.02), marks={"chance": 0.5}))
    if bins := s.notes.get("reliability"):
        drawn.append(draw(figures.plot, folder, "reward-calibration", [
            Series(sets.get(name, name), [b["confidence"] for b in of], [b["right"] for b in of]) for name, of in bins.items()],
            "How often pairs are ordered right at each confidence; on the diagonal a score can be taken at its word.",
            [s.cite()], x="confidence, sigmoid of the score difference", y="pairs ordered right", diagonal=True))
    short = [s.row(f"reward model, {label}", f"{name}_accuracy", SHARE) for name, label in sets.items()]
    short += [s.row(f"held-out prompts, {key.partition('/')[2].replace('=', ' ')}", key, SHARE) for key in s.manifest.metrics
              if key.startswith("heldout_accuracy/")]
    short += [s.row("least log-probability, fresh samples", base, SHARE), s.row("length, fresh samples", length, SHARE)]
    rows = [s.row(f"rank distance {d}, {label}", f"{name}_accuracy_distance_{d}", SHARE)
             for name, label in sets.items() for d in distances if s.get(f"{name}_accuracy_distance_{d}")]
    rows += [s.row(f"{what}, {label}", f"{name}_{key}") for name, label in sets.items()
             for key, what in (("ece", "calibration error"), ("brier", "Brier score"))]
    tables = [Table(MEASURED, short, "Share of pairs ordered right. Intervals know that pairs of one prompt are related.", [s.cite()]),
              Table([*MEASURED, "asked", "verdict"],
                    [[*s.row(called("reward_model", r.name), r.name), r.asked, r.level] for r in judged.reasons],
                    "The gate: each figure against what is asked of it, decided by its interval (docs/reward-model.md).", [s.cite()],
                    folded=judged.level == "pass"),
              Table(MEASURED, rows, "By rank distance, and how far scores can be read as probabilities.", [s.cite()], folded=True)]
    line = [*s.row("Reward model: pairs of fresh SFT samples ordered right", "fresh_accuracy", SHARE),
            f"log-probability baseline {s.value(base, SHARE)}; gain {s.short_form('gain_over_min_logprob', GAIN)}"]
    return Section("reward_model", TITLES["reward_model"], paragraphs, drawn, tables), [line]


def forgetting(s: cited.Stage) -> list[str]:
    old, new = s.get("before/base_loss"), s.get("after/base_loss")
    if not (old and new):
        return []
    change = number(CHANGE.text(new["value"] - old["value"]), s.origin("metrics", "after/base_loss") + " - before/base_loss")
    text = ("Forgetting: the loss on held-out text of the base corpus went from "
            f"{s.short_form('before/base_loss', LOSS)} to {s.short_form('after/base_loss', LOSS)} ({change} nats a token), on "
            f"{s.n('after/base_loss')} tokens.")
    return [text + (f" KL from the base on that text: {s.full('after/kl_to_base', LOSS)} positions." if s.get("after/kl_to_base") else "")]


PPO_ROWS = tuple((key, called("ppo", key), form, gain) for key, form, gain in (
    ("gold", SCORE, CHANGE), ("score", SCORE, CHANGE), ("sampled_accuracy", SHARE, GAIN), ("greedy_accuracy", SHARE, GAIN),
    ("entropy", SCORE, CHANGE), ("kl", SCORE, CHANGE), ("length", Form(1), Form(1, sign="+")), ("eos_rate", SHARE, GAIN)))


def rejection_sampling(stages: Stages, folder: Path) -> Told:
    s, rival = stages["rejection_sampling"], stages.get("ppo")
    text = (f"{s.count('responses')} responses to {s.count('prompts')} prompts in {s.config.get('rounds', MISSING)} rounds, scored by "
            f"{cited.scorer(stages, s)}; of each prompt's {s.config.get('samples_per_prompt', MISSING)} the best "
            f"{s.config.get('keep', MISSING)}, {s.count('dialogues')} in all, were learned. On {s.n('gain/gold')} problems the gold "
            f"score changed by "
            f"{s.short_form('gain/gold', CHANGE)}, for {s.count('flops')} FLOPs.")
    columns = ["", "before", "after", "paired gain", "95 % interval", "n"]
    rows = [[label, s.value(f"before/{key}", form), s.value(f"after/{key}", form), *s.row("", f"gain/{key}", gain)[1:]]
            for key, label, form, gain in PPO_ROWS]
    caption = "The problems measured before and after. Gains and their intervals are paired by problem."
    if rival:
        text += (f" PPO's change is {rival.short_form('gain/gold', CHANGE)} on {rival.n('gain/gold')} problems, of "
                 f"{rival.count('responses')} responses, for {rival.count('flops')} FLOPs.")
        columns.append("PPO, after")
        rows = [[*row, rival.value(f"after/{key}", form)] for row, (key, _, form, _) in zip(rows, PPO_ROWS, strict=True)]
    line = [*s.row("Rejection sampling: gold score over SFT", "gain/gold", CHANGE), f"{verdict(s.ends('gain/gold'))}; "
            f"{s.count('flops')} FLOPs; KL {s.value('after/kl', Form(2))} nats a response"]
    sources = [s.cite(), *([rival.cite()] if rival else [])]
    return Section("rejection_sampling", TITLES["rejection_sampling"], [text], tables=[Table(columns, rows, caption, sources)]), [line]


def ppo(stages: Stages, folder: Path) -> Told:
    s = stages["ppo"]
    where = f"held-out problems of {s.config['problems']}" if s.config.get("problems") else "validation problems"
    paragraphs = [
        f"{s.count('responses')} responses in {s.config.get('iterations', MISSING)} iterations, rewarded by {cited.scorer(stages, s)}, at "
        f"a price of {s.config.get('kl_coef', MISSING)} a nat of KL. The gold score is a program's: right answer, right steps, format. On "
        f"{s.n('gain/gold')} {where} the gold score changed by {s.short_form('gain/gold', CHANGE)} and the accuracy of "
        f"sampled answers by {s.short_form('gain/sampled_accuracy', GAIN)}, at a KL of {s.value('after/kl', Form(2))} nats a response."]
    greedy, entropy, sampled = (s.ends(f"gain/{key}") for key in ("greedy_accuracy", "entropy", "sampled_accuracy"))
    if greedy and entropy and sampled:
        reading = ("Greedy accuracy rose too, so this is more than a sharper distribution." if greedy[0] > 0 else
                   "Greedy accuracy did not rise distinguishably while entropy fell: the gain of sampled answers may be mere sharpening."
                   if entropy[1] < 0 < sampled[0] else "Greedy accuracy did not rise distinguishably.")
        paragraphs.append(f"Greedy accuracy changed by {s.short_form('gain/greedy_accuracy', GAIN)}; entropy went from "
                          f"{s.value('before/entropy')} to {s.value('after/entropy')} nats a token. {reading}")
    paragraphs += forgetting(s)
    if s.get("change/worked_accuracy"):
        paragraphs.append(f"Greedy accuracy on {s.n('change/worked_accuracy')} validation problems of all tasks, worked answers: "
                          f"{s.value('before/worked_accuracy', SHARE)} before, {s.full('after/worked_accuracy', SHARE)} after "
                          f"({s.short_form('change/worked_accuracy', GAIN)}).")
    source = [s.cite("metrics.jsonl")]
    per, last = s.config.get("epochs", 1) * s.config.get("minibatches", 1), s.config.get("iterations", 0)

    def ends(label: str, key: str, color: int) -> list[Series]:
        """What was measured on validation problems before and after, as points."""
        at = [(x, found) for x, when in ((0, "before"), (last, "after")) if (found := s.get(f"{when}/{key}"))]
        low, high = ([found.get("ci95", [found["value"]] * 2)[i] for _, found in at] for i in (0, 1))
        return [Series(label, [x for x, _ in at], [found["value"] for _, found in at], low, high, "points", color)] if at else []

    def logged(label: str, key: str, color: int) -> list[Series]:
        return s.series(label, key, per=per, color=color)

    charts = {
        "ppo-scores": ("mean score", [*logged("reward (proxy)", "objective/score", 0), *ends("", "score", 0),
                                      *logged("gold score", "objective/gold", 1), *ends("", "gold", 1)],
                       "Reward and gold score of each iteration's samples: reward that rises while gold falls is an exploited reward "
                       "model. Points: validation problems before and after, with 95 % intervals."),
        "ppo-accuracy": ("accuracy", [*logged("sampled", "objective/accuracy", 0), *ends("", "sampled_accuracy", 0),
                                      *ends("greedy (validation)", "greedy_accuracy", 1)],
                         "Accuracy of sampled answers over training. Points: validation problems, sampled and greedy, before and after."),
        "ppo-kl": ("KL (nats a response)", [*logged("", "objective/kl", 0), *ends("", "kl", 0)],
                   "Distance from the SFT model. Points: validation problems."),
        "ppo-entropy": ("entropy (nats a token)", [*logged("", "objective/entropy", 0), *ends("", "entropy", 0)],
                        "Entropy of the policy. Mere sharpening shows as a fall without a gain in greedy accuracy."),
        "ppo-health": ("share", [*logged("ends by itself", "response/eos_rate", 0), *logged("clipped ratios", "policy/clip_fraction", 1),
                                 *logged("explained variance", "value/explained_variance", 2)],
                       "Health: answers that end, ratios clipped, variance of the returns that the critic explains.")}
    alarms = {f"alarm: {a['name']}": a["step"] / per for a in s.notes.get("alarms", [])}
    drawn = [draw(figures.plot, folder, name, series, caption + (" Upright: where an alarm was first raised." if alarms else ""), source,
                  x="iteration", y=y, events=alarms)
             for name, (y, series, caption) in charts.items() if series]
    drawn += story_hacking.drawn(s, folder)
    table = Table(["", "before", "after", "paired gain", "95 % interval", "n"], [
        [label, s.value(f"before/{key}", form), s.value(f"after/{key}", form), *s.row("", f"gain/{key}", gain)[1:]]
        for key, label, form, gain in PPO_ROWS],
        "Validation problems before and after PPO. Gains and their intervals are paired by problem.", [s.cite()])
    lines = [[*s.row("PPO: gold score over SFT", "gain/gold", CHANGE), f"{verdict(s.ends('gain/gold'))}; reward "
              f"{s.value('gain/score', CHANGE)}; KL {s.value('after/kl', Form(2))} nats a response"],
             [*s.row("PPO: accuracy of sampled answers over SFT", "gain/sampled_accuracy", GAIN), f"{verdict(sampled)}; greedy accuracy "
              f"{s.short_form('gain/greedy_accuracy', GAIN)}; entropy {s.value('gain/entropy', CHANGE)}"]]
    return Section("ppo", TITLES["ppo"], [*paragraphs, *story_hacking.paragraphs(s)], drawn, [table, *story_hacking.tables(s)]), lines


Cells = Mapping[tuple[str, str, str], Mapping[str, Any]]  # by task, strategy, model


def evaluation(stages: Stages, folder: Path) -> Told:
    s = stages["evaluation"]
    results = s.manifest.product("results")
    found = json.loads(results.read_text(encoding="utf-8"))
    cells: Cells = {(c["task"], c["strategy"], c["model"]): c for c in found["cells"]}
    votes = s.config.get("num_samples", MISSING)
    text = (f"{s.count('cells')} cells of model, task and strategy, on {s.count('problems')} test problems. Few-shot prompts hold "
            f"{s.config.get('shots', MISSING)} examples; self-consistency is the majority of {votes} chains at temperature "
            f"{s.config.get('temperature', MISSING)}, and one such chain is shown beside it; everything else is greedy. An answer that "
            "cannot be read counts as wrong. Intervals are Wilson's (of one sampled chain: a bootstrap over problems).")
    source = [s.cite(results.name)]
    rows = []
    order = {name: place for place, name in enumerate((*STRATEGIES, *MODELS))}
    for (task, strategy, model), c in sorted(cells.items(), key=lambda cell: [order.get(name, -1) for name in reversed(cell[0])]):
        where = f"{results}#{model}/{task}/{strategy}"
        rows.append([MODELS.get(model, model), task, STRATEGIES.get(strategy, strategy), *(number(t, f"{where}/{key}") for key, t in (
            ("accuracy", SHARE.text(c["accuracy"])), ("interval", SHARE.between(interval(c))), ("n", f"{c['n']:,}"),
            ("unparsed over num_samples", SHARE.text(c["unparsed"] / c["num_samples"])), ("finished", SHARE.text(c["finished"])),
            ("tokens_mean", f"{c['tokens_mean']:.1f}")))])
    tables = [Table(["model", "task", "strategy", "accuracy", "95 % interval", "n", "unreadable", "ends", "tokens a question"], rows,
                    "Every cell. Unreadable: samples without an answer. Ends: samples that end by themselves.", source)]
    names = {"strategies": STRATEGIES, "models": MODELS}
    if found.get("pairs"):
        tables.append(story_frontier.pair_rows(found["pairs"], results, source, **names))
    tables += story_frontier.matched(found.get("frontier", []), results, source, **names)
    asked = {(strategy, model) for model, chosen in s.config.get("models", {}).items() for strategy in chosen}
    tasks = dict.fromkeys(c["task"] for c in found["cells"])
    drawn = [figure for task in tasks for figure in task_figures(cells, task, asked, folder, source)]
    drawn += [story_frontier.frontier(of, folder, source, **names) for of in found.get("frontier", [])]
    drawn += story_frontier.compute(found.get("compute", []), folder, source, MODELS)
    drawn += story_frontier.examples(found["cells"], s.config.get("shots", 0), folder, source, MODELS)
    return Section("evaluation", TITLES["evaluation"], [text], drawn, tables), effects(found["comparisons"], cells, votes, results)


def interval(c: Mapping[str, Any]) -> list[float]:
    return c.get("wilson95") or c["bootstrap95"]


def bar(c: Mapping[str, Any] | None) -> figures.Bar | None:
    return (c["accuracy"], *interval(c)) if c else None  # type: ignore[return-value]


def task_figures(cells: Cells, task: str, asked: set[tuple[str, str]], folder: Path, source: list[str]) -> list[Figure]:
    """Accuracy by strategy and model, and against difficulty."""
    here = {key[1:]: c for key, c in cells.items() if key[0] == task}
    by_strategy = {label: {name: bar(here.get((strategy, model))) for model, name in MODELS.items()
                           if (strategy, model) in asked | set(here)} for strategy, label in STRATEGIES.items()}
    file = "".join(letter if letter.isalnum() else "-" for letter in task)
    drawn = [draw(figures.bars, folder, f"accuracy-{file}", {label: row for label, row in by_strategy.items() if row},
                  f"{task}: accuracy by strategy and model, with 95 % intervals.", source, x="accuracy", x_range=(0, 1.02))]
    model = next((m for m in ("sft", "ppo", "base") if any(key[1] == m for key in here)), "")
    harder = []
    for color, strategy in enumerate(("direct", "zero_shot_cot", "self_consistency")):
        levels = here.get((strategy, model), {}).get("by_difficulty", {})
        if len(levels) > 1:
            low, high = ([c["wilson95"][i] for c in levels.values()] for i in (0, 1))
            harder.append(Series(STRATEGIES[strategy], [float(d) for d in levels], [c["accuracy"] for c in levels.values()], low, high,
                                 color=color))
    if harder:
        drawn.append(draw(figures.plot, folder, f"difficulty-{file}", harder, f"{task}: accuracy of the {MODELS[model]} model as problems "
                          "need more steps.", source, x="difficulty (steps)", y="accuracy", y_range=(0, 1.02)))
    return drawn


def origin(p: Mapping[str, Any], results: Path) -> str:
    return f"{results}#{p['a']}-{p['b']}/{p['task']}"


def compared(p: Mapping[str, Any], results: Path) -> list[str]:
    """Difference, interval and n of a comparison."""
    return [number(t, f"{origin(p, results)}/{key}") for key, t in
            (("difference", GAIN.text(p["difference"])), ("ci95", GAIN.between(p["ci95"])), ("n", f"{p['n']:,}"))]


def effects(comparisons: list[dict[str, Any]], cells: Cells, votes: Any, results: Path) -> list[list[str]]:
    """Summary lines: what chains of thought and votes add, by task, for the SFT model (the base model where that was not measured)."""
    wanted = (("zero_shot_cot", "direct", "CoT over direct answers"),
              ("self_consistency", "sampled_cot", f"{votes} votes over one sampled chain"),
              ("self_consistency", "zero_shot_cot", f"{votes} votes over greedy CoT"))
    lines = []
    for a, b, name in wanted:
        for p in comparisons:
            model = next((m for m in ("sft", "base") if any(q["a"] == f"{m}/{a}" and q["b"] == f"{m}/{b}" for q in comparisons)), "")
            if p["task"] == "all" or (p["a"], p["b"]) != (f"{model}/{a}", f"{model}/{b}"):
                continue
            sides = [f"{STRATEGIES[key]} " + number(SHARE.text(cells[p["task"], key, model]["accuracy"]),
                                                    f"{results}#{model}/{p['task']}/{key}/accuracy") for key in (a, b)]
            lines.append([f"{name}, {p['task']}", *compared(p, results),
                          f"{MODELS[model]} model: {', '.join(sides)}; {verdict(p['ci95'])}"])
    return lines


SECTIONS: dict[str, Callable[[Stages, Path], Told]] = {
    "sft": sft, "preferences": preferences, "reward_model": reward_model, "rejection_sampling": rejection_sampling,
    "ppo": ppo, "evaluation": evaluation}
