"""Made-up finished runs of every stage, for the report's tests, and the report of them."""
import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from reward.annotators import annotator_name
from reward.overoptimization import best_of_n
from stages.evals import scoring
from stages.evals.frontier import computed, frontiers
from stages.evals.pairs import pairs
from stages.evaluation import metrics_of
from stages.laws.fit import expected, fit_law, law, predict
from stages.laws.isoflop import grid_curves
from stages.report import ReportConfig, main
from stages.rl.curves import compare
from stages.run import page, story
from stages.run.cited import Stage
from stages.run.config import build_config
from stages.run.manifest import MANIFEST, Manifest, hash_path, metric

STAGES = ("prepare", "scaling", "pretrain", "sft", "preferences", "reward_model", "ppo", "evaluation")
LAW = (0.3, 40.0, 400.0, 0.5, 0.55)


def share(value: float, n: int, width: float = 0.03) -> dict:
    return metric(value, n=n, ci95=(max(0.0, value - width), min(1.0, value + width)))


def write_run(home: Path, stage: str, *, metrics, counts=None, notes=None, config=None, parents=(), files=None, log=(), seed=0,
              products=None) -> None:
    folder = home / stage
    folder.mkdir(parents=True)
    for name, text in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if log:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    named = {name.split(".")[0]: name for name in files or {} if "/" not in name} | (products or {})
    products = {name: {"path": path, "sha256": hash_path(folder / path)} for name, path in named.items()}
    (folder / MANIFEST).write_text(json.dumps({
        "stage": stage.rsplit("/")[-1], "recipe": "tiny", "status": "finished", "fingerprint": f"sha256:{hash_of(stage)}",
        "config": {"seed": seed, **(config or {})}, "parents": {p: f"sha256:{hash_of(p)}" for p in parents}, "seed": seed,
        "inputs": {"task word_problems": f"sha256:{hash_of('asked')}"} if stage == "evaluation" else {},
        "identity": {"stage": stage, "config": {"seed": seed, **(config or {})}},
        "products": products, "counts": counts or {}, "metrics": metrics, "notes": notes or {},
        "provenance": {"commit": "0123456789abcdef0123", "dirty": False, "versions": {"torch": "2.13.0"}, "wall_s": 61.5, "attempts": 1,
                       "hardware": "2 x Made-up Processor", "peak_rss_bytes": 1 << 30, "world_size": 1,
                       "started": "2026-11-21T20:00:00+00:00"}}))


def rehash(run: Path) -> None:
    """Have the manifest of a run hold the hashes of products that were changed by hand."""
    data = json.loads((run / MANIFEST).read_text())
    for product in data["products"].values():
        product["sha256"] = hash_path(run / product["path"])
    (run / MANIFEST).write_text(json.dumps(data))


def hash_of(stage: str) -> str:
    return "".join(f"{ord(letter):02x}" for letter in stage)[:12].ljust(64, "0")


def curve(start: float, end: float, steps: int, key: str, tokens: int | None = None) -> list[dict]:
    return [{"step": i, **({"tokens": tokens * i} if tokens else {}), key: end + (start - end) * math.exp(-5 * i / steps)}
            for i in range(1, steps + 1)]


HOSTILE = ("<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'> ![](http://127.0.0.1:9/a.png) "
           "\x027\x03forged\x04 \u202ea|b")


def records(strategy: str, right: float, seed: int) -> list[dict]:
    """What the evaluation leaves of one cell: 40 problems with one sample each, eight for self-consistency."""
    rng, found = random.Random(seed), []
    for i in range(40):
        samples = []
        for _ in range(8 if strategy == "self_consistency" else 1):
            answer = "7" if rng.random() < right else "8"
            samples.append({"text": f"{HOSTILE}\nThe answer is {answer}.", "prompt_tokens": 30, "tokens": 5 if strategy == "direct" else 40,
                            "finished": True, "finish": "stop", "answer": answer, "correct": answer == "7",
                            "gold_score": float(answer == "7"), "faults": []})
        votes = [s["answer"] for s in samples]
        answer = max(sorted(set(votes)), key=votes.count)
        found.append({"id": str(i), "task": "word_problems", "question": f"Question {i} {HOSTILE}", "difficulty": 1 + i % 4,
                      "gold": "7", "answer": answer, "correct": answer == "7", "tie": False, "samples": samples,
                      "cost": {"requests": len(samples), "prompt_tokens": 30 * len(samples), "generated_tokens": sum(
                          s["tokens"] for s in samples)}})
    return found


def make_runs(home: Path, stages=STAGES) -> Path:
    """Small finished runs with the keys that the stages write."""
    points = [{"run": f"d{d}-{D}", "N": N, "D": D, "loss": float(law(LAW, N, D)) * (1 + 0.002 * math.sin(N + D)), "flops": 6.0 * N * D}
              for d, N in ((32, 60_000), (48, 130_000), (64, 220_000), (96, 480_000)) for D in (150_000, 300_000, 600_000)]
    fit = fit_law(*zip(*[(p["N"], p["D"], p["loss"]) for p in points], strict=True), num_draws=20, conventions={"N": "matmul parameters"})
    value, ends = predict(fit, 880_000, 2_000_000)
    prediction = {"value": value, "interval": list(ends), "loss": "heldout_loss", "N": 880_000, "D": 2_000_000, "flops": 1e13,
                  "tokens": 2_000_000, "hidden_size": 128, "written": "2026-11-21T19:59:00Z"}
    cells = {("base", "word_problems", "direct"): 0.2, ("base", "word_problems", "zero_shot_cot"): 0.5,
             ("sft", "word_problems", "direct"): 0.2, ("sft", "word_problems", "few_shot"): 0.25,
             ("sft", "word_problems", "zero_shot_cot"): 0.85, ("sft", "word_problems", "self_consistency"): 0.6,
             ("ppo", "word_problems", "zero_shot_cot"): 0.9}
    judged = {key: records(key[2], right, i) for i, (key, right) in enumerate(cells.items())}
    found = [{"model": m, "task": t, "strategy": s, **scoring.summary(rows)} for (m, t, s), rows in judged.items()]
    found += [{"model": m, "task": t, "strategy": scoring.SAMPLED, **scoring.sampled_summary(rows)}
              for (m, t, s), rows in judged.items() if s == "self_consistency"]
    texts = {f"results/{m}/{t}.{s}.jsonl": "".join(json.dumps(row) + "\n" for row in rows) for (m, t, s), rows in judged.items()}
    judged = {key: [scoring.without_texts(row) for row in rows] for key, rows in judged.items()}
    costs = frontiers(judged)
    results = {"cells": found, "comparisons": scoring.comparisons(judged), "pairs": pairs(judged), "frontier": costs, "compute": computed(
        costs, {"pretrain": {"counts": {"flops": 1.7e13, "matmul_parameters": 880_000}, "parents": {}},
                "sft": {"counts": {"flops": 2e12}, "parents": {"pretrain": ""}}})}
    values = {"score": 0.1, "gold": 0.8, "sampled_accuracy": 0.6, "kl": 0.0, "entropy": 0.3, "length": 40.0, "eos_rate": 0.98,
              "greedy_accuracy": 0.8}
    gains = {"score": 0.9, "gold": 0.21, "sampled_accuracy": 0.12, "kl": 4.1, "entropy": -0.1, "length": 1.0, "eos_rate": 0.01,
             "greedy_accuracy": 0.01}
    tuned = {"worked_accuracy": (0.11, 0.64), "direct_accuracy": (0.05, 0.21), "format_rate": (0.0, 1.0), "stop_rate": (0.0, 1.0)}
    curves, _ = compare([{"step": 4 * i, "objective/score": i / 40, "objective/kl": i / 10, "objective/gold": (i / 40) ** 0.5 - i / 50}
                         for i in range(40)],
                        best_of_n([[0.0, 1.0, 2.0, 3.0, 4.0]] * 2, [[0.8, 0.7, 0.9, 0.9, 0.9], [0.5, 0.6, 0.7, 0.8, 0.9]]))
    content = {
        "prepare": {"metrics": {"kept_share": metric(0.925, n=50_000), "bytes_per_token/web/a.txt": metric(3.25, n=1_234_567),
                                "contamination/gsm8k": metric(0.02, n=1319)}, "notes": {
            "dropped": {"exact duplicate": 2827}, "sources": {"web/a.txt": {}}, "contamination": {"gsm8k": {}},
            "kinds": {"worked": 17_946, "direct": 9839}, "row_length": 512}, "counts": {
            "vocabulary": 620, "documents": 46_239, **{f"{p}_{k}": n for p in ("train", "heldout") for k, n in (
                ("documents", 33_791), ("rows", 4207), ("tokens", 2_136_881))}}},
        "scaling": {"metrics": {"predicted_loss": metric(value, n=12, ci95=ends), "holdout_error": metric(0.011, n=3),
                                "holdout_coverage": metric(0.667, n=3), "holdout_error_4x": metric(0.031, n=2),
                                **{k: metric(fit[k], n=12, ci95=fit["intervals"][k]) for k in ("E", "A", "B", "alpha", "beta")}},
                    "counts": {"runs": 12, "tokens": 4_200_000, "flops": 8.7e12, "flops_unshared": 1.2e13}, "parents": ["prepare"],
                    "config": {"parameters": "matmul"}, "files": {"fit.json": json.dumps(fit), "prediction.json": json.dumps(prediction),
                              "points.jsonl": "".join(json.dumps(p) + "\n" for p in points),
                              "curves.json": json.dumps(grid_curves(*np.array([[p["flops"], p["N"], p["loss"]] for p in points]).T)),
                              **{f"{p['run']}/metrics.jsonl": "".join(
                                  json.dumps(row) + "\n" for key in ("heldout/loss", "train/loss")
                                  for row in curve(5, p["loss"], 10, key, p["D"] // 10)) for p in points}}},
        "pretrain": {"metrics": {"heldout_loss": metric(value * 1.01, n=192_055, ci95=(value, value * 1.02)),
                                 "heldout_accuracy": metric(0.829, n=192_055), "heldout_loss/story": metric(1.2, n=900, ci95=(1.1, 1.3)),
                                 "heldout_accuracy/story": metric(0.6, n=900)},
                     "counts": {"parameters": 963_968, "matmul_parameters": 880_000, "tokens": 2_000_000, "steps": 1953, "flops": 1.7e13},
                     "config": {"architecture": "qwen3", "num_layers": 4, "hidden_size": 128}, "parents": ["prepare"],
                     "notes": {"forecast": prediction}, "log": [
                         *curve(6.4, 0.45, 40, "train/loss", 50_000),
                         *({**row, "heldout/accuracy": 0.8 - 0.5 / row["step"]} for row in curve(3, 0.46, 10, "heldout/loss", 200_000))]},
        "sft": {"metrics": {"validation_loss": metric(0.08, n=300), "validation_gap": metric(0.017, n=300),
                            **{f"{when}/{k}": share(pair[i], 200) for k, pair in tuned.items()
                               for i, when in enumerate(("before", "after"))},
                            "change/worked_accuracy": metric(0.53, n=200, ci95=(0.46, 0.6)),
                            "change/base_loss": metric(0.55, n=48_042, ci95=(0.5, 0.6)),
                            "before/base_loss": metric(0.456, n=48_042, ci95=(0.44, 0.47)),
                            "after/base_loss": metric(1.01, n=48_042, ci95=(0.98, 1.03))},
                "counts": {"dialogues": 3000, "tokens": 427_758, "cut": 0, "steps": 375}, "config": {"method": "lora", "lora_rank": 16},
                "parents": ["prepare", "pretrain"], "log": [*curve(2, 0.06, 20, "train/loss"), *curve(0.2, 0.08, 5, "eval/loss")]},
        "preferences": {"metrics": {"kept_share": share(0.8, 1500), "all_tie_share": share(0.2, 1500), "gold_mean": share(0.7, 1500),
                                    "annotator_flipped_pairs": share(0.0, 9000), "sample_accuracy": share(0.5, 1500),
                                    "distinct_responses": metric(6.5, n=1500, ci95=(6.4, 6.6))},
                        "counts": {"asked": 1500, "samples": 12_000, "flops": 3.1e12, "prompts": 1200, "responses": 8000,
                                   "pairs": 9000, "tokens": 400_000},
                        "notes": {"annotators": [annotator_name(0.0)], "simulated": True},
                        "config": {"source": None, "temperature": 1.2}, "parents": ["prepare", "sft"]},
        "reward_model": {"metrics": {
            "heldout_accuracy": share(0.83, 900), "fresh_accuracy": share(0.82, 3000), "heldout_ece": metric(0.03, n=900),
            "heldout_brier": metric(0.12, n=900), "fresh_ece": metric(0.04, n=3000), "fresh_brier": metric(0.13, n=3000),
            **{f"{s}_accuracy_distance_{d}": share(0.7 + 0.05 * d, 400) for s in ("heldout", "fresh") for d in (1, 2, 3)},
            "baseline_min_logprob_accuracy": share(0.71, 3000), "baseline_length_accuracy": share(0.52, 3000),
            "gain_over_min_logprob": metric(0.11, n=3000, ci95=(0.08, 0.14)), "score_mean": metric(0.0, n=2400),
            "score_std": metric(1.0, n=2400)},
            "counts": {"parameters": 900_000, "steps": 300, "flops": 2.2e12, "train_prompts": 1080,
                       "train_responses": 7200, "heldout_prompts": 120},
            "notes": {"simulated_annotator": True, "reliability": {"fresh": [
                {"low": 0.5, "high": 0.55, "n": 1000, "confidence": 0.53, "right": 0.5},
                {"low": 0.9, "high": 0.95, "n": 2000, "confidence": 0.93, "right": 0.97}]}}, "parents": ["prepare", "sft", "preferences"],
            "log": [*curve(0.5, 0.86, 20, "train/accuracy"), *curve(0.6, 0.83, 5, "heldout/accuracy")]},
        "ppo": {"metrics": {**{f"before/{k}": share(v, 300) for k, v in values.items()},
                            **{f"after/{k}": metric(v + gains[k], n=300, ci95=(v + gains[k] - 0.03, v + gains[k] + 0.03))
                               for k, v in values.items()},
                            **{f"gain/{k}": metric(v, n=300, ci95=(v - 0.02, v + 0.02)) for k, v in gains.items()},
                            "best_of_n/gold": metric(0.91, n=2, ci95=(0.9, 0.92))},
                "notes": {"alarms": [{"name": "kl", "step": 120, "value": 3.25, "threshold": 3.0, "sentence": "too far"}],
                          "kept_step": 100, "last_step": 160, "best_step": 100, "on_alarm": "rollback", "watched_iterations": 40},
                "files": {"overoptimization.json": json.dumps(curves), "samples.jsonl": "".join(json.dumps({"step": step, "samples": [
                    {"prompt": f"question {i}", "response": f"answer {i} at {step}", "score": 0.5, "gold": None if i else 0.25, "kl": 0.1}
                    for i in range(2)]}) + "\n" for step in (0, 40, 160))},
                "counts": {"responses": 7680, "tokens": 300_000, "steps": 160, "parameters": 1_800_000},
                "parents": ["prepare", "sft", "reward_model"],
                "config": {"iterations": 40, "epochs": 1, "minibatches": 4, "reward": {"model": 1.0}, "kl_coef": 0.05}, "log": [
                    {"step": 4 * i, "objective/score": i / 40, "objective/gold": 0.8 + i / 200, "objective/accuracy": 0.6 + i / 400,
                     "objective/kl": i / 10, "objective/entropy": 0.3 - i / 400, "response/eos_rate": 0.98, "policy/clip_fraction": 0.05,
                     "value/explained_variance": i / 50} for i in range(1, 41)]},
        "rejection_sampling": {"metrics": {f"{when}/{k}": metric(v + share * gains[k], n=300, ci95=(v, v + gains[k]))
                                           for when, share in (("before", 0), ("after", 0.5)) for k, v in values.items()}
                                          | {f"gain/{k}": metric(v / 2, n=300, ci95=(0.4 * v, 0.6 * v)) for k, v in gains.items()},
                               "counts": {"prompts": 720, "responses": 5760, "dialogues": 684, "flops": 1_014_891_520_000},
                               "config": {"rounds": 2, "keep": 1, "samples_per_prompt": 8, "reward": {"model": 1.0}},
                               "parents": ["prepare", "sft", "reward_model"]},
        "evaluation": {"metrics": metrics_of(results), "counts": {"problems": 40, "cells": len(judged), "tokens": 30_000},
                       "parents": ["prepare", "pretrain", "sft", "ppo"],
                       "config": {"models": {"base": ["direct", "zero_shot_cot"], "ppo": ["zero_shot_cot", "self_consistency"],
                                             "sft": ["direct", "few_shot", "zero_shot_cot", "self_consistency"]},
                                  "num_samples": 8, "temperature": 1.0, "shots": 2},
                       "files": {"results.json": json.dumps(results), **texts}, "products": {"items": "results"}}}
    for stage in stages:
        write_run(home, stage, **content[stage])
    return home


def report(home: Path) -> Manifest:
    parents = {s: str(home / s) for s in ReportConfig.PARENTS}
    return main(build_config(ReportConfig, {"run_dir": str(home / "report"), "parents": parents}, recipe="tiny"))


def tell(home: Path, folder: Path) -> page.Page:
    stages = {s: Stage(Manifest(home / s)) for s in ReportConfig.PARENTS if (home / s / MANIFEST).is_file()}
    return story.tell(stages, {s: f"{s} has not been run" for s in STAGES if s not in stages}, folder, recipe="tiny", law=expected)


def small_figure(path: Path, *content, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("<svg/>")


class Reader(HTMLParser):
    """Collects what a browser would fetch or open, the tags left open, and the text."""

    def __init__(self):
        super().__init__()
        self.links, self.open, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
