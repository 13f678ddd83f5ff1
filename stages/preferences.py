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
from reward import preferences
from reward.preferences import Record
from reward.verifiers import annotator_name, gold_score, simulated_ranks
from stages.data.corpora import hub_rows, known_revision
from stages.data.curriculum import WORKED, user_turn
from stages.data.problems import read_problems
from stages.data.tokenizer import chat_ids
from stages.models.responses import draw_responses, stop_ids
from stages.models.training import gather
from stages.run.config import StageConfig, option
from stages.run.console import progress
from stages.run.entry import launch
from stages.run.manifest import Manifest, Run, hash_data, hash_path, is_main, metric, say, write_json


@dataclass(frozen=True, kw_only=True)
class PreferencesConfig(StageConfig):
    STAGE = "preferences"
    PARENTS = ("prepare", "sft")

    source: str | None = option(None, "a .jsonl, .jsonl.gz or .parquet file of preferences, or a hub dataset id (default: sample and rank)")
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
    max_responses: int = option(10_000, "ranked responses at most (0: as many as there are)")
    max_prompts: int = option(0, "prompts with a ranking at most (0: as many as there are)")
    chunk_prompts: int = option(64, "prompts sampled at a time, over all processes; a killed run continues after the last chunk")


def main(config: PreferencesConfig) -> Manifest:
    local = config.source is not None and is_local(config.source)
    inputs: dict[str, str | None] = {}
    if config.source is not None:
        inputs["source"] = hash_path(preferences.existing(config.source)) if local else known_revision(config.source)
    run = Run(config, inputs=inputs | ({"annotator": hash_data(config.annotator)} if config.annotator else {}))
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
    records, differing = preferences.read(source) if local else preferences.collect(hub_rows(source, None, config.hub_split), source)
    named = {"annotator": config.annotator, "simulated": config.annotator.startswith("simulated")} if config.annotator else {}
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
        if full(config, ranked, len(kept) + 1):
            break
        kept.append({"annotator": "unknown", "simulated": False, "criterion": "overall"} | record | named)
    say(f"{source}: {len(records) + differing:,} rows; left out: {ties} all tied, {long} longer than {config.max_length} tokens, "
        f"{differing} whose two prompts differ")
    if not kept:
        raise ValueError(f"{source}: no preference is left: raise max_length ({config.max_length})")
    asked = len(records) + differing
    return kept, {"kept_share": metric(len(kept) / asked, n=asked, ci95=wilson(len(kept), asked))}, {
        "asked": asked, "all_tied": ties, "too_long": long, "prompts_differ": differing}


def full(config: PreferencesConfig, responses: int, prompts: int) -> bool:
    """Whether so many are more than were asked for."""
    return 0 < config.max_responses < responses or 0 < config.max_prompts < prompts


def from_samples(config: PreferencesConfig, run: Run, tokenizer) -> tuple[list[Record], dict, dict]:
    """Sample, judge and rank, a chunk of prompts at a time, until there are as many as were asked for or no problem is left."""
    if config.responses_per_prompt < 2 or not 0 <= config.error_rate <= 0.5:
        raise ValueError(f"responses_per_prompt {config.responses_per_prompt} and error_rate {config.error_rate}: "
                         "a ranking needs 2 responses or more and an error rate between 0 and 0.5")
    sft = run.parents["sft"]
    model = AutoModelForCausalLM.from_pretrained(sft.product("model"), dtype="auto")
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    eos_ids = stop_ids(model)
    origin = {"model": sft.data["products"]["model"]["sha256"], "temperature": config.temperature, "seed": config.seed}
    problems = read_problems(run.parents["prepare"].product("problems") / "preferences.jsonl", config.tasks, config.difficulties)

    records: list[Record] = []
    judged: list[dict[str, Any]] = []
    ranked, enough = 0, False
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
            chunk = judge(config, tokenizer, part, prompts, drawn, eos_ids)
            if is_main():
                write_json(file, chunk)
        for row in chunk:
            record = row["record"]
            size = len(record["responses"]) if record else 0
            if enough := full(config, ranked + max(1, size), len(records) + 1):
                break
            judged.append(row)
            if record:
                records.append({**record, "origin": origin})
                ranked += size
        if enough or full(config, ranked + 1, len(records) + 1):
            break
    if not records:
        raise ValueError(f"all {len(judged)} prompts tie: raise temperature ({config.temperature}) or difficulties {config.difficulties}")
    return records, measure(judged), {"asked": len(judged), "samples": len(judged) * config.responses_per_prompt}


def judge(config: PreferencesConfig, tokenizer, problems: list[dict], prompts: list[list[int]], drawn: list[list[list[int]]],
          eos_ids: list[int]) -> list[dict[str, Any]]:
    """For each problem what was sampled and, unless all responses tie, the record with the simulated ranking.

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
        ranks = simulated_ranks(scores, error_rate=config.error_rate, row_id=problem["id"], seed=config.seed)
        pairs = preferences.pairs(ranks)
        record = {"id": problem["id"], "prompt": [{"role": "user", "content": user_turn(problem["question"], WORKED)}],
                  "responses": texts, "ranks": ranks, "annotator": annotator_name(config.error_rate), "simulated": True,
                  "criterion": "overall", "order": list(range(len(ids))), "drawn": times, "gold_scores": scores,  # judged as first drawn
                  "prompt_ids": prompt, "response_ids": ids}
        rows.append({"record": record if pairs else None, "pairs": len(pairs), "distinct": len(times),
                     "flipped": sum(scores[better] < scores[worse] - 1e-9 for better, worse, _ in pairs),
                     "gold": sum(s * t for s, t in zip(scores, times, strict=True)) / len(responses),
                     "correct": sum(g.correct * t for g, t in zip(gold, times, strict=True)) / len(responses)})
    return rows


def measure(judged: list[dict[str, Any]]) -> dict[str, dict]:
    """What was sampled, before prompts whose responses all tie are left out. Means over prompts: samples of one prompt are related."""
    n = len(judged)
    kept, pairs = sum(row["record"] is not None for row in judged), sum(row["pairs"] for row in judged)
    flipped = sum(row["flipped"] for row in judged)
    metrics = {"kept_share": metric(kept / n, n=n, ci95=wilson(kept, n)),
               "all_tie_share": metric(1 - kept / n, n=n, ci95=wilson(n - kept, n)),
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
