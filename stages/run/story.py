"""The report of a recipe, told from the manifests of its finished stages: data and pretraining here, the scaling law in
stages.run.story_scaling, what comes after in stages.run.story_alignment. A section takes the stages by name and the folder of the
report's figures."""
from collections.abc import Callable, Mapping
from pathlib import Path

from stages.run import figures, story_alignment, story_pipeline, story_samples, story_scaling
from stages.run.checkpoint import read_metrics
from stages.run.cited import LOSS, MISSING, SHARE, TITLES, Stage, Stages, Told, annotator, draw, short_hash
from stages.run.console import clock
from stages.run.manifest import MANIFEST, hash_data
from stages.run.page import Page, Section, Table, foreign, number


def tell(stages: Stages, missing: Mapping[str, str], folder: Path, *, recipe: str, law: story_scaling.Law) -> Page:
    """`stages` are the finished ones in the order of the pipeline; `missing` says of each other one that
    belongs to it what would make it."""
    sections: dict[str, Callable[[Stages, Path], Told]] = {
        "prepare": prepare, "scaling": lambda s, f: story_scaling.scaling(s, f, law), "pretrain": pretrain, **story_alignment.SECTIONS}
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
