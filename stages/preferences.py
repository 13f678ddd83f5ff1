"""Ranked responses: K samples of the SFT model a prompt, ranked by a simulated annotator; or the user's own preference files.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m stages.preferences --config recipes/tiny/preferences.yaml
"""
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prompts.intervals import mean_interval, wilson
from reward import preferences
from reward.preferences import Record
from reward.verifiers import annotator_name, gold_score, simulated_ranks
from stages.data.curriculum import WORKED, user_turn
from stages.data.tokenizer import END, chat_ids
from stages.models.sampling import prompt_key, sample
from stages.models.training import gather, rank, world_size
from stages.run.config import StageConfig, option
from stages.run.console import progress
from stages.run.entry import launch
from stages.run.manifest import Manifest, Run, hash_path, is_main, metric, say, write_json


@dataclass(frozen=True, kw_only=True)
class PreferencesConfig(StageConfig):
    STAGE = "preferences"
    PARENTS = ("prepare", "sft")

    source: str | None = option(None, "a .jsonl, .jsonl.gz or .parquet file of preferences, or a hub dataset id (default: sample and rank)")
    hub_split: str = option("train", "split of the hub dataset")
    max_length: int = option(512, "tokens of prompt and response; longer records of a file are left out and counted")
    tasks: list[str] = option(["word_problems", "chained_variables"], "tasks of the problems (empty: all)")
    difficulties: list[int] = option([3, 4], "difficulties of the problems (empty: all)")
    responses_per_prompt: int = option(8, "samples a prompt; equal ones are kept once")
    temperature: float = option(1.2, "of the sampling; a little above the policy's own shows more mistakes a prompt")
    max_new_tokens: int = option(96, "longest response")
    error_rate: float = option(0.0, "how often the simulated annotator judges a pair the wrong way round, 0 to 0.5")
    max_responses: int = option(10_000, "ranked responses at most (files: 0 takes all)")
    chunk_prompts: int = option(64, "prompts sampled at a time, over all processes; a killed run continues after the last chunk")


def main(config: PreferencesConfig) -> Manifest:
    local = config.source is not None and is_local(config.source)
    run = Run(config, inputs={"source": hash_path(preferences.existing(config.source))} if local and config.source else {})
    if run.finished:
        return run.manifest
    model_path = run.parents["sft"].product("model")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    if config.source is not None:
        records, metrics, counts = from_source(config, config.source, local, tokenizer)
    else:
        records, metrics, counts = from_samples(config, run, tokenizer)
    if is_main():
        preferences.write(run.directory / "preferences.parquet", records)
    ranked = sum(len(r["responses"]) for r in records)
    by = sorted({r["annotator"] for r in records})
    say(f"preferences: {len(records):,} prompts with {ranked:,} ranked responses, annotator: {', '.join(by)}")
    counts |= {"prompts": len(records), "responses": ranked, "pairs": sum(len(preferences.pairs(r["ranks"])) for r in records),
               "tokens": sum(len(ids) for r in records for ids in [r["prompt_ids"], *r["response_ids"]])}
    return run.finish(metrics=metrics, counts=counts, products={"preferences": "preferences.parquet"},
                      notes={"annotators": by, "simulated": any(r["simulated"] for r in records)})


def is_local(source: str) -> bool:
    return source.endswith((".jsonl", ".gz", ".parquet")) or Path(source).exists()


def from_source(config: PreferencesConfig, source: str, local: bool, tokenizer) -> tuple[list[Record], dict, dict]:
    """Records of a file or hub dataset, with token ids. Raises ValueError naming file and line."""
    records, differing = preferences.read(source) if local else preferences.collect(hub_rows(source, config.hub_split), source)
    kept: list[Record] = []
    ties = long = ranked = 0
    for record in progress(records, f"reading {source}"):
        if len(set(record["ranks"])) < 2:
            ties += 1
            continue
        record = preferences.encode(record, partial(chat_ids, tokenizer))
        if len(record["prompt_ids"]) + max(map(len, record["response_ids"])) > config.max_length:
            long += 1
            continue
        ranked += len(record["ranks"])
        if config.max_responses and ranked > config.max_responses:
            break
        kept.append({"annotator": "unknown", "simulated": False, "criterion": "overall"} | record)
    say(f"{source}: {len(records) + differing:,} rows; left out: {ties} all tied, {long} longer than {config.max_length} tokens, "
        f"{differing} whose two prompts differ")
    if not kept:
        raise ValueError(f"{source}: no preference is left: raise max_length ({config.max_length})")
    asked = len(records) + differing
    return kept, {"kept_share": metric(len(kept) / asked, n=asked, ci95=wilson(len(kept), asked))}, {
        "asked": asked, "all_tied": ties, "too_long": long, "prompts_differ": differing}


def hub_rows(source: str, split: str) -> Iterator[tuple[str, Record]]:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        raise ValueError(f"{source} is not a local file and HF_HUB_OFFLINE=1 is set: give a path that exists")
    import datasets

    for number, row in enumerate(datasets.load_dataset(source, split=split, streaming=True), start=1):
        yield f"{source}, row {number}", row


def from_samples(config: PreferencesConfig, run: Run, tokenizer) -> tuple[list[Record], dict, dict]:
    """Sample, judge and rank, a chunk of prompts at a time, until there are `max_responses` ranked responses or no problem is left."""
    if config.responses_per_prompt < 2 or not 0 <= config.error_rate <= 0.5:
        raise ValueError(f"responses_per_prompt {config.responses_per_prompt} and error_rate {config.error_rate}: "
                         "a ranking needs 2 responses or more and an error rate between 0 and 0.5")
    sft = run.parents["sft"]
    model = AutoModelForCausalLM.from_pretrained(sft.product("model"), dtype="auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    origin = {"model": sft.data["products"]["model"]["sha256"], "temperature": config.temperature, "seed": config.seed}
    problems = read_problems(run.parents["prepare"].product("problems") / "preferences.jsonl", config.tasks, config.difficulties)

    records: list[Record] = []
    judged: list[dict[str, Any]] = []
    ranked = 0
    folder = run.directory / "chunks"
    if is_main():
        folder.mkdir(exist_ok=True)
    starts = range(0, len(problems), config.chunk_prompts)
    for start in progress(starts, "sampling preferences (stops when there are enough)"):
        file = folder / f"{start:07d}.json"
        done = gather([json.loads(file.read_text(encoding="utf-8")) if is_main() and file.is_file() else None])[0]
        chunk = done or sorted(gather(judge_chunk(config, model, tokenizer, problems, start)), key=lambda row: row["index"])
        if done is None and is_main():
            write_json(file, chunk)
        for row in chunk:
            record = row["record"]
            if ranked + len(record["responses"] if record else []) > config.max_responses:
                ranked = config.max_responses
                break
            judged.append(row)
            if record:
                records.append({**record, "origin": origin})
                ranked += len(record["responses"])
        if ranked >= config.max_responses:
            break
    if not records:
        raise ValueError(f"all {len(judged)} prompts tie: raise temperature ({config.temperature}) or difficulties {config.difficulties}")
    return records, measure(judged), {"asked": len(judged), "samples": len(judged) * config.responses_per_prompt}


def read_problems(path: Path, tasks: list[str], difficulties: list[int]) -> list[dict]:
    """Problem rows of these tasks and difficulties. Raises ValueError naming those there are."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [r for r in rows if (not tasks or r["task"] in tasks) and (not difficulties or r["difficulty"] in difficulties)]
    if not kept:
        raise ValueError(f"no problem of {path} has tasks {tasks} and difficulties {difficulties}: choose from tasks "
                         f"{sorted({r['task'] for r in rows})} and difficulties {sorted({r['difficulty'] for r in rows})}")
    return kept


def judge_chunk(config: PreferencesConfig, model, tokenizer, problems: list[dict], start: int) -> list[dict[str, Any]]:
    """This process's share of a chunk: samples, gold scores and, unless all responses tie, the record with the simulated ranking.

    Equal responses are kept once: nobody ranks a text against itself, an erring judge would set one above the other, and the
    reward model would encode it again for nothing. How often each was drawn is kept in `drawn`.
    """
    mine = list(range(start, min(start + config.chunk_prompts, len(problems))))[rank()::world_size()]
    k = config.responses_per_prompt
    end = tokenizer.convert_tokens_to_ids(END)
    messages = [[{"role": "user", "content": user_turn(problems[i]["question"], WORKED)}] for i in mine]
    prompts = [chat_ids(tokenizer, m, ask=True) for m in messages]
    keys = [(prompt_key(problems[i]["id"]), j) for i in mine for j in range(k)]
    drawn = sample(model, [p for p in prompts for _ in range(k)], keys=keys, seed=config.seed, temperature=config.temperature,
                   max_new_tokens=config.max_new_tokens, eos_ids=[end], pad_id=tokenizer.pad_token_id)
    rows = []
    for n, i in enumerate(mine):
        counts: dict[tuple[int, ...], int] = {}
        for ids in drawn[n * k:(n + 1) * k]:
            counts[tuple(ids)] = counts.get(tuple(ids), 0) + 1
        ids = [list(key) for key in counts]
        texts = [t.strip() for t in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        gold = [gold_score(problems[i], text, finished=r[-1] == end) for text, r in zip(texts, ids, strict=True)]
        scores = [g.score for g in gold]
        ranks = simulated_ranks(scores, error_rate=config.error_rate, row_id=problems[i]["id"], seed=config.seed)
        times = list(counts.values())
        pairs = preferences.pairs(ranks)
        record = None if not pairs else {
            "id": problems[i]["id"], "prompt": messages[n], "responses": texts, "ranks": ranks, "simulated": True, "criterion": "overall",
            "annotator": annotator_name(config.error_rate), "drawn": times, "gold_scores": scores,
            "prompt_ids": prompts[n], "response_ids": ids}
        rows.append({"index": i, "record": record, "pairs": len(pairs), "flipped": sum(scores[a] < scores[b] - 1e-9 for a, b, _ in pairs),
                     "gold": sum(s * t for s, t in zip(scores, times, strict=True)) / k, "distinct": len(times),
                     "correct": sum(g.correct * t for g, t in zip(gold, times, strict=True)) / k})
    return rows


def measure(judged: list[dict[str, Any]]) -> dict[str, dict]:
    """What was sampled, before prompts whose responses all tie are left out. Means over prompts: samples of one prompt are related."""
    n = len(judged)
    kept, pairs = sum(row["record"] is not None for row in judged), sum(row["pairs"] for row in judged)
    flipped = sum(row["flipped"] for row in judged)
    metrics = {"kept_share": metric(kept / n, n=n, ci95=wilson(kept, n)), "all_tie_share": metric(1 - kept / n, n=n, ci95=wilson(n - kept, n)),
               "annotator_flipped_pairs": metric(flipped / max(1, pairs), n=pairs, ci95=wilson(flipped, pairs))}
    for name, key in (("gold_mean", "gold"), ("sample_accuracy", "correct"), ("distinct_responses", "distinct")):
        values = [float(row[key]) for row in judged]
        if n > 1:
            mean, low, high = mean_interval(values)
            metrics[name] = metric(mean, n=n, ci95=(low, high))
        else:
            metrics[name] = metric(values[0], n=1)
    return metrics


if __name__ == "__main__":
    launch(main, PreferencesConfig)
