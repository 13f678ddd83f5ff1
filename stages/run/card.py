"""What an exported model says about itself: where it comes from, by hashes, and the model card that its README.md is.

Every figure is one of a manifest. What no manifest holds is said to be unknown; nothing is filled in.
"""
import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stages.run.manifest import Manifest
from stages.run.names import called
from stages.run.redaction import without_secrets

Json = dict[str, Any]
KINDS = {"pretrain": "A base language model: it continues text and was not taught to converse.",
         "sft": "A language model taught to answer in turns by supervised fine-tuning.",
         "rejection_sampling": "A language model tuned on its own best samples, after supervised fine-tuning.",
         "ppo": "A policy: a tuned language model improved by PPO against a reward.",
         "reward_model": "A reward model: a sequence classifier with one output, the score of a response after its prompt."}
CALLED = {"pretrain": "base", "sft": "sft", "ppo": "ppo"}  # in an evaluation


def lineage(source: Manifest) -> list[Json]:
    """The run and all runs it stands on, parents first: stage, recipe, fingerprint, seed, commit, hashes of products and inputs.

    A run is looked for where its child found it. One that has moved, or was made again since, has its fingerprint and a reason `unknown`.
    """
    found: dict[str, Json] = {}

    def visit(manifest: Manifest) -> None:
        for name, fingerprint in manifest.data.get("parents", {}).items():
            if fingerprint in found:
                continue
            try:
                parent = Manifest(manifest.config["parents"][name])
            except (ValueError, KeyError):
                found[fingerprint] = {"stage": name, "fingerprint": fingerprint, "unknown": "its run folder is not where it was"}
                continue
            if parent.fingerprint == fingerprint:
                visit(parent)
            else:
                found[fingerprint] = {"stage": name, "fingerprint": fingerprint, "unknown": "it was made again since, differently"}
        data, made = manifest.data, manifest.data.get("provenance", {})
        found[manifest.fingerprint] = {
            "stage": data["stage"], "recipe": data.get("recipe"), "fingerprint": manifest.fingerprint, "seed": data.get("seed"),
            "commit": made.get("commit"), "dirty": made.get("dirty"), "inputs": data.get("inputs", {}), "products": {
                name: of.get("sha256") for name, of in data.get("products", {}).items()}, "counts": data.get("counts", {}),
            "notes": data.get("notes", {}), "settings": data.get("identity", {}).get("config", {})}

    visit(source)
    return list(found.values())


def plain(value: Any) -> str:
    """Any text as one line of Markdown that shows it and does nothing else: no tag, link, table cell or heading comes of it."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", text)


def code(text: str) -> str:
    """A block that no text inside can close."""
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=2) + 1)
    return f"{max(fence, '```', key=len)}yaml\n{text.rstrip()}\n{max(fence, '```', key=len)}"


def figures(metrics: Mapping[str, Json], stage: str) -> list[str]:
    rows = ["| measure | value | 95 % interval | n |", "| --- | ---: | ---: | ---: |"]
    for name, of in metrics.items():
        ends = of.get("ci95")
        rows.append(f"| {plain(called(stage, name))} "
                    f"| {of['value']:.4g} | {'[{:.4g}, {:.4g}]'.format(*ends) if ends else '-'} | {of.get('n', '-')} |")
    return rows


def data_lines(runs: list[Json]) -> list[str]:
    """What the model has seen, stage by stage, as far as the manifests say."""
    lines = []
    for run in runs:
        counts, notes = run.get("counts", {}), run.get("notes", {})
        if "unknown" in run:
            lines.append(f"- {run['stage']}: unknown, {run['unknown']}")
        elif run["stage"] == "prepare":
            sources = "; ".join(f"{plain(name)} ({of.get('documents', 0):,} documents, {of.get('tokens', 0):,} tokens)"
                                for name, of in notes.get("sources", {}).items())
            lines.append(f"- corpus: {sources or 'unknown'}; {counts.get('train_tokens', 0):,} tokens to train on, the rest held out")
        elif run["stage"] == "pretrain":
            lines.append(f"- pretraining: {counts.get('tokens', 0):,} tokens")
        elif run["stage"] == "sft" and not notes.get("adopted"):
            lines.append(f"- dialogues: {counts.get('dialogues', 0):,} of " + ", ".join(map(plain, notes.get("sources", {}))))
        elif run["stage"] == "preferences":
            who = "a **simulated** annotator (a program)" if notes.get("simulated") else "annotators"
            lines.append(f"- preferences: {counts.get('prompts', 0):,} prompts ranked by {who}: "
                         + ", ".join(map(plain, notes.get("annotators", []))))
        elif run["stage"] in ("ppo", "rejection_sampling"):
            lines.append(f"- {run['stage']}: {counts.get('responses', 0):,} responses of its own, rewarded by "
                         + ", ".join(f"{plain(name)} x {weight:g}" for name, weight in run["settings"].get("reward", {}).items()))
    return lines


def limits(runs: list[Json], metrics: Mapping[str, Json], ensemble: bool) -> list[str]:
    last = runs[-1]
    lines = ["- What it was not measured on is not known. The intervals are over the items of each measure, not over seeds: it is one run."]
    if any(run.get("notes", {}).get("simulated") for run in runs):
        lines.append("- The preferences behind it were made by a program, not by people; it says nothing about what people prefer.")
    if any("unknown" in run for run in runs):
        lines.append("- Part of its lineage could not be read when it was exported; those runs are given by their hash alone.")
    if any(run.get("dirty") for run in runs):
        lines.append("- Some of its runs were made from a working tree with changes that were not committed.")
    if last["stage"] == "pretrain":
        lines.append("- The chat template in its tokenizer is that of later stages: this model has not learned it.")
    if last["stage"] == "reward_model":
        lines.append("- It judges what resembles its training data. A policy trained against it long enough will find what it overrates.")
    if ensemble:
        lines.append("- The run has an ensemble; this is its plain model alone (the mean of its heads, or its first member).")
    if last.get("notes", {}).get("adopted"):
        lines.append("- It was trained elsewhere and adopted: what it learned from is not known, whatever the recipe's data are.")
    if not metrics:
        lines.append("- No measure of it is recorded.")
    return lines


def usage(stage: str, name: str) -> list[str]:
    if stage == "reward_model":
        return ["    from transformers import AutoModelForSequenceClassification, AutoTokenizer",
                f'    model = AutoModelForSequenceClassification.from_pretrained("{name}")',
                f'    tokenizer = AutoTokenizer.from_pretrained("{name}", padding_side="right")',
                "    # score = (logit - config.score_mean) / config.score_std: standard deviations of samples of the SFT model"]
    ask = "plain text, which it continues" if stage == "pretrain" else "tokenizer.apply_chat_template(messages, add_generation_prompt=True)"
    return ["    from transformers import AutoModelForCausalLM, AutoTokenizer",
            f'    model = AutoModelForCausalLM.from_pretrained("{name}")', f'    tokenizer = AutoTokenizer.from_pretrained("{name}")',
            f"    # prompt: {ask}"]


def card(source: Manifest, runs: list[Json], *, name: str, evaluated: Mapping[str, Json], ensemble: bool, checks: Mapping[str, Any]) -> str:
    """README.md of an export. `evaluated` are metrics of an evaluation of this very run, by task and strategy."""
    stage, metrics = source.data["stage"], source.metrics
    head = {"library_name": "transformers", "pipeline_tag": "text-classification" if stage == "reward_model" else "text-generation",
            "tags": ["plumbline", stage.replace("_", "-")]}
    counts = source.counts
    settings = yaml.safe_dump(without_secrets(runs[-1]["settings"]), sort_keys=False, allow_unicode=True, width=120)
    parts = ["---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", "", f"# {plain(name)}", "", KINDS[stage],
             *([f"{counts['parameters']:,} parameters."] if "parameters" in counts else []), "",
             "## Use", "", "For research, teaching and tests of tools: to study how such a model comes about. It makes things up, and "
             "nobody has checked it for safety. Do not let it decide anything, and do not put it before the public.",
             "No licence is set: who publishes it chooses one, and minds those of the data.", "",
             *usage(stage, name.rpartition("/")[2]), "",
             "## Data", "", *(data_lines(runs) or ["Unknown."]), "",
             "## Recipe", "", f"Stage `{stage}` of the recipe {plain(runs[-1]['recipe'])}, seed {runs[-1]['seed']}:", "", code(settings),
             "", "## Measures", "", *(figures(metrics, stage) if metrics else ["None recorded."]), ""]
    if evaluated:
        parts += ["Answers right, by task and strategy:", "", *figures(evaluated, "evaluation"), ""]
    parts += ["## Limits", "", *limits(runs, metrics, ensemble), "",
              "## Lineage", "", "| stage | recipe | seed | commit | fingerprint | product |", "| --- | --- | --- | --- | --- | --- |"]
    for run in runs:
        commit = f"{str(run.get('commit'))[:12]}{' + changes' if run.get('dirty') else ''}"
        product = (run.get("products") or {}).get("model") or ""
        cells = [plain(run["stage"]), plain(run.get("recipe", "-")), run.get("seed", "-"), commit if "commit" in run else "-",
                 run["fingerprint"], product or "-"]
        parts.append(f"| {' | '.join(map(str, cells))} |")
    said = "; ".join(f"{plain(key)}: {plain(value)}" for key, value in checks.items())
    parts += ["", f"Checked when it was exported: {said}. `manifest.json` has the hash of every file.", ""]
    return "\n".join(parts)


def evaluation_of(source: Manifest, folder: Path) -> dict[str, Json]:
    """The accuracies that an evaluation measured of this very run; none when there is no such evaluation, or it was of another run."""
    name = CALLED.get(source.data["stage"])
    try:
        evaluation = Manifest(folder)
    except ValueError:
        return {}
    if name is None or evaluation.data.get("parents", {}).get(source.data["stage"]) != source.fingerprint:
        return {}
    return {key.removeprefix(f"{name}/"): of for key, of in evaluation.metrics.items()
            if key.startswith(f"{name}/") and key.count("/") == 2}
