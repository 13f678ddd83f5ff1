"""Ranked responses: K samples of the SFT model a prompt, ranked by a simulated annotator; or the user's own preference files.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m stages.preferences --config recipes/tiny/preferences.yaml
"""
import json
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prompts.intervals import mean_interval, wilson
from reward import agreement, preferences
from reward.annotators import Errors, Panel
from reward.folders import trusted
from reward.preferences import Record
from reward.verifiers import gold_score
from stages.data.corpora import hub_rows, known_revision
from stages.data.curriculum import WORKED, user_turn
from stages.data.problems import read_problems
from stages.data.tokenizer import chat_ids
from stages.models.responses import draw_responses, stop_ids
from stages.models.training import gather
from stages.rl.costs import drawn_counts
from stages.run.config import StageConfig, option
from stages.run.console import progress
from stages.run.entry import launch
from stages.run.manifest import Manifest, Run, hash_data, hash_path, is_main, metric, say, write_json


@dataclass(frozen=True, kw_only=True)
class PreferencesConfig(StageConfig):
    STAGE = "preferences"
    PARENTS = ("prepare", "sft")

    source: str | None = option(None, "a .jsonl, .jsonl.gz or .parquet file of preferences, or a hub dataset id; the columns tell its form "
                                "(default: sample and rank)")
    hub_split: str = option("train", "split of the hub dataset")
    annotator: str | None = option(None, "who ranked the source, beginning with `simulated` unless people did (default: what its rows "
                                   "say, else people)", recorded_only=True)
    max_length: int = option(512, "tokens of prompt and response; longer records of a file are left out and counted")
    tasks: list[str] = option(["word_problems", "chained_variables"], "tasks of the problems (empty: all)")
    difficulties: list[int] = option([3, 4], "difficulties of the problems (empty: all)")
    responses_per_prompt: int = option(8, "samples a prompt; equal ones are kept once")
    temperature: float = option(1.2, "of the sampling; a little above the policy's own shows more mistakes a prompt")
    max_new_tokens: int = option(96, "longest response")
    error_rate: float = option(0.0, "how often the simulated annotator judges a pair the wrong way round, 0 to 0.5")
    position_bias: float = option(0.0, "share of pairs in which it prefers what was shown first (the order is then drawn by chance)")
    length_bias: float = option(0.0, "share of pairs in which it prefers the longer response")
    inconsistency: float = option(0.0, "how often it reverses a pair when asked again, 0 to 0.5; needs repeat_share")
    annotators: int = option(1, "simulated annotators, each with errors of its own")
    overlap: float = option(1.0, "share of the prompts that all annotators rank; each other prompt goes to one of them")
    repeat_share: float = option(0.0, "share of what it ranked that each annotator is asked again")
    max_responses: int = option(10_000, "ranked responses at most (0: as many as there are)")
    max_prompts: int = option(0, "prompts with a ranking at most (0: as many as there are)")
    chunk_prompts: int = option(64, "prompts sampled at a time, over all processes; a killed run continues after the last chunk")


LEFT_OUT = {"all_tied": "left out because all tie:", "too_long": "longer than max_length:", "prompts_differ": "with two different prompts:",
            "empty_text": "with an empty response:", "too_few_scored": "with fewer than two scores:", "skipped": "skipped by annotators:",
            "unscored_responses": "single responses without a score:"}


def main(config: PreferencesConfig) -> Manifest:
    local = config.source is not None and is_local(config.source)
    inputs: dict[str, str | None] = {}
    if config.source is not None:
        inputs["source"] = hash_path(preferences.existing(config.source)) if local else known_revision(config.source)
    run = Run(config, inputs=inputs | ({"annotator": hash_data(config.annotator)} if config.annotator else {}))
    if run.finished:
        return run.manifest
    model_path = run.parents["sft"].product("model")
    tokenizer = AutoTokenizer.from_pretrained(trusted(model_path))
    if config.source is not None:
        records, metrics, counts = from_source(config, config.source, local, tokenizer)
    else:
        records, metrics, counts = from_samples(config, run, tokenizer)
    if is_main():
        preferences.write(run.directory / "preferences.parquet", records)
    records = [r for r in records if "skipped" not in r]
    ranked = sum(len(r["responses"]) for r in records)
    by = sorted({r["annotator"] for r in records})
    prompts = len({json.dumps(r["prompt"]) for r in records})
    say(f"preferences: {prompts:,} prompts, {len(records):,} rankings of {ranked:,} responses, annotator: {', '.join(by)}")
    counts |= {"prompts": prompts, "rankings": len(records), "responses": ranked,
               "pairs": sum(len(preferences.pairs(r["ranks"])) for r in records),
               "tokens": sum(len(ids) for r in records for ids in [r["prompt_ids"], *r["response_ids"]])}
    return run.finish(metrics=metrics, counts=counts, products={"preferences": "preferences.parquet"},
                      notes={"annotators": by, "simulated": any(r["simulated"] for r in records)})


def is_local(source: str) -> bool:
    return source.endswith((".jsonl", ".gz", ".parquet")) or Path(source).exists()


def from_source(config: PreferencesConfig, source: str, local: bool, tokenizer) -> tuple[list[Record], dict, dict]:
    """Records of a file or hub dataset, with token ids. Raises ValueError naming file and line."""
    rows = preferences.rows(Path(source)) if local else hub_rows(source, None, config.hub_split)
    left_out: Counter[str] = Counter()
    seen: list[Record] = []
    kept: list[Record] = []
    ranked = learned = 0
    for record in progress(preferences.checked(rows, source, left_out, skipped=True), f"reading {source}"):
        record = {"annotator": preferences.NOBODY, "simulated": record.get("annotator", "").startswith("simulated"),
                  "criterion": "overall"} | record
        seen.append(record)
        if "skipped" in record:  # kept, so that nobody is asked again; nothing is learned from it
            left_out["skipped"] += 1
            kept.append(record)
            continue
        if len(set(record["ranks"])) < 2:
            left_out["all_tied"] += 1
            continue
        record = preferences.encode(record, partial(chat_ids, tokenizer))
        if len(record["prompt_ids"]) + max(map(len, record["response_ids"])) > config.max_length:
            left_out["too_long"] += 1
            continue
        ranked += len(record["ranks"])
        if full(config, ranked, learned + 1):
            seen.pop()  # there is enough: neither this one nor what follows counts
            break
        learned += 1
        kept.append(record)
    asked = len(seen) + sum(left_out[reason] for reason in ("prompts_differ", "empty_text", "too_few_scored"))
    say(f"{source}: {asked:,} rows" + "".join(f", {text} {left_out[reason]}" for reason, text in LEFT_OUT.items() if left_out[reason]))
    if not learned:
        raise ValueError(f"{source}: no preference is left of {asked:,}: the line above says why; max_length is {config.max_length}")
    metrics, repeated = compare(seen)
    if config.annotator:
        several = len({r["annotator"] for r in kept}) > 1  # one name for all would make repetitions of what several ranked
        kept = [record | {"annotator": f"{config.annotator} ({record['annotator']})" if several else config.annotator,
                          "simulated": config.annotator.startswith("simulated")} for record in kept]
    if any(r["annotator"] == preferences.NOBODY for r in kept):
        say("nobody says who ranked some of them: set `annotator`, beginning with `simulated` unless people did")
    return kept, {"kept_share": metric(learned / asked, n=asked, ci95=wilson(learned, asked))} | metrics, {
        "asked": asked, "flops": 0, **dict.fromkeys(("all_tied", "too_long", "prompts_differ"), 0), **left_out, **repeated}


def compare(records: list[Record]) -> tuple[dict[str, dict], dict[str, int]]:
    """Agreement and biases as metrics, and counts of repeated rankings, as far as the records allow (reward/agreement.py)."""
    repeated = agreement.repeats(records)
    if repeated.again:
        say(f"warning: {repeated.again} rankings repeat one of the same annotator: {repeated.duplicated} exactly, "
            f"{repeated.contradicting} contradict it. All are kept")
    figures = agreement.summary(records)
    for name, f in figures.items():
        say(f"{name}: {f.value:.3f} [{f.low:.3f}, {f.high:.3f}], n={f.n:,}")
    return {name: metric(f.value, n=f.n, ci95=(f.low, f.high)) for name, f in figures.items()}, {
        "repeated": repeated.again, "duplicated": repeated.duplicated, "contradicting": repeated.contradicting}


def full(config: PreferencesConfig, responses: int, prompts: int) -> bool:
    """Whether so many are more than were asked for."""
    return 0 < config.max_responses < responses or 0 < config.max_prompts < prompts


def from_samples(config: PreferencesConfig, run: Run, tokenizer) -> tuple[list[Record], dict, dict]:
    """Sample, judge and rank, a chunk of prompts at a time, until there are as many as were asked for or no problem is left."""
    if config.responses_per_prompt < 2:
        raise ValueError(f"responses_per_prompt {config.responses_per_prompt}: a ranking needs 2 responses or more")
    panel = Panel(errors=Errors(error_rate=config.error_rate, position_bias=config.position_bias, length_bias=config.length_bias,
                                inconsistency=config.inconsistency),
                  annotators=config.annotators, overlap=config.overlap, repeat_share=config.repeat_share, seed=config.seed)
    sft = run.parents["sft"]
    model = AutoModelForCausalLM.from_pretrained(trusted(sft.product("model")), dtype="auto")
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    eos_ids = stop_ids(model)
    origin = {"model": sft.data["products"]["model"]["sha256"], "temperature": config.temperature, "seed": config.seed}
    problems = read_problems(run.parents["prepare"].product("problems") / "preferences.jsonl", config.tasks, config.difficulties)

    records: list[Record] = []
    judged: list[dict[str, Any]] = []
    drawn_rows: list[dict[str, Any]] = []  # whether or not they were needed
    ranked, prompts_ranked, enough = 0, 0, False
    folder = run.directory / "chunks"
    if is_main():
        folder.mkdir(exist_ok=True)
    starts = range(0, len(problems), config.chunk_prompts)
    for start in progress(starts, "sampling preferences (stops when there are enough)"):
        file = folder / f"{start:07d}.json"
        chunk = gather([json.loads(file.read_text(encoding="utf-8")) if is_main() and file.is_file() else None])[0]
        if chunk is None:
            part = problems[start:start + config.chunk_prompts]
            prompts = [chat_ids(tokenizer, [{"role": "user", "content": user_turn(p["question"], WORKED)}], ask=True) for p in part]
            drawn = draw_responses(model, prompts, [p["id"] for p in part], samples=config.responses_per_prompt, seed=config.seed,
                                   temperature=config.temperature, max_new_tokens=config.max_new_tokens, eos_ids=eos_ids,
                                   pad_id=tokenizer.pad_token_id)
            chunk = judge(panel, tokenizer, part, prompts, drawn, eos_ids)
            if is_main():
                write_json(file, chunk)
        drawn_rows += chunk
        for row in chunk:
            usable = [r for r in row["records"] if preferences.pairs(r["ranks"])]
            size = sum(len(r["responses"]) for r in usable)
            if enough := full(config, ranked + max(1, size), prompts_ranked + 1):
                break
            judged.append(row)
            records += [{**r, "origin": origin} for r in usable]
            ranked, prompts_ranked = ranked + size, prompts_ranked + bool(usable)
        if enough or full(config, ranked + 1, prompts_ranked + 1):
            break
    if not records:
        raise ValueError(f"all {len(judged)} prompts tie: raise temperature ({config.temperature}) or difficulties {config.difficulties}")
    metrics, counts = measure(judged), {"asked": len(judged), "samples": len(judged) * config.responses_per_prompt}
    counts |= drawn_counts(model.config, drawn_rows, config.responses_per_prompt)
    if panel == Panel(errors=Errors(error_rate=config.error_rate), seed=config.seed):
        return records, metrics, counts
    compared, repeated = compare([r for row in judged for r in row["records"]])
    return records, metrics | compared, counts | repeated


def judge(panel: Panel, tokenizer, problems: list[dict], prompts: list[list[int]], drawn: list[list[list[int]]],
          eos_ids: list[int]) -> list[dict[str, Any]]:
    """For each problem what was sampled and the records with the simulated rankings, none where only one response is left.

    Equal responses are kept once: nobody ranks a text against itself, an erring judge would set one above the other, and the
    reward model would encode it again for nothing. How often each was drawn is kept in `drawn`.
    """
    rows = []
    for problem, prompt, responses in zip(problems, prompts, drawn, strict=True):
        counts = Counter(map(tuple, responses))  # in the order of first drawing
        ids, times = [list(key) for key in counts], list(counts.values())
        texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        gold = [gold_score(problem, text, finished=r[-1] in eos_ids) for text, r in zip(texts, ids, strict=True)]
        scores = [g.score for g in gold]
        record = {"prompt": [{"role": "user", "content": user_turn(problem["question"], WORKED)}], "responses": texts,
                  "criterion": "overall", "drawn": times, "gold_scores": scores, "prompt_ids": prompt, "response_ids": ids}
        records: list[Record] = [record | ranking for ranking in panel.rank(problem["id"], texts, scores)] if len(ids) > 1 else []
        pairs = [pair for r in records for pair in preferences.pairs(r["ranks"])]
        rows.append({"records": records, "pairs": len(pairs), "distinct": len(times),
                     "flipped": sum(scores[better] < scores[worse] - 1e-9 for better, worse, _ in pairs),
                     "prompt_tokens": len(prompt), "sampled_tokens": sum(map(len, responses)),
                     "gold": sum(s * t for s, t in zip(scores, times, strict=True)) / len(responses),
                     "correct": sum(g.correct * t for g, t in zip(gold, times, strict=True)) / len(responses)})
    return rows


def measure(judged: list[dict[str, Any]]) -> dict[str, dict]:
    """What was sampled, before prompts whose responses all tie are left out. Means over prompts: samples of one prompt are related."""
    n = len(judged)
    kept, pairs = sum(row["pairs"] > 0 for row in judged), sum(row["pairs"] for row in judged)
    flipped = sum(row["flipped"] for row in judged)
    metrics = {"kept_share": metric(kept / n, n=n, ci95=wilson(kept, n)),
               "all_tie_share": metric(1 - kept / n, n=n, ci95=wilson(n - kept, n)),
               "annotator_flipped_pairs": metric(flipped / max(1, pairs), n=pairs, ci95=wilson(flipped, pairs))}
    for name, key in (("gold_mean", "gold"), ("sample_accuracy", "correct"), ("distinct_responses", "distinct")):
        values = [float(row[key]) for row in judged]
        if n > 1:
            mean, low, high = mean_interval(values)
            metrics[name] = metric(mean, n=n, ci95=(low, high) if low < high else None)  # without spread nothing is known of the error
        else:
            metrics[name] = metric(values[0], n=1)
    return metrics


if __name__ == "__main__":
    launch(main, PreferencesConfig)
