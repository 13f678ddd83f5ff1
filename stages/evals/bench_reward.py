"""Benchmark: comparisons a second, encoded responses a second and peak memory of reward training on rankings of K responses.

    python -m stages.evals.bench_reward --rounds 3

A ranking of K responses has K (K - 1) / 2 pairs. TRL's RewardTrainer takes pairs, so that it encodes each response K - 1 times; this
project's trainer encodes it once. Every variant trains from the same random decoder on the same rankings with the same optimizer, as
many pairs a step and about as many rows a forward pass, in a process of its own; rounds go over all of them, so that what slows the
machine slows all. Ratios are within rounds; the first step of a run is not timed. TRL's defaults (bf16, recomputed activations) are
left out unless asked for with `--variants`: on a CPU without bf16 they take ten times as long. Prompts and answers are the
curriculum's, ranks are random: speed does not depend on them.
"""
import argparse
import itertools
import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from stages.evals.studies import in_rounds, markdown, measured
from stages.run.console import clock
from stages.run.entry import run_program
from stages.run.manifest import say

VARIANTS = {"RewardTrainer": "TRL's trainer with its defaults", "RewardTrainer, fp32": "the same without bf16 and recomputed activations",
            "rows": "this project's, each response encoded once, behind its prompt",
            "ranked": "this project's default: each prompt encoded once as well"}
BASELINES = ("RewardTrainer", "RewardTrainer, fp32")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.bench_reward", description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS)[1:], choices=list(VARIANTS), help="how to train", metavar="VARIANT")
    parser.add_argument("--widths", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps that are timed, in each run")
    parser.add_argument("--batch-size", type=int, default=8, help="rankings a step")
    parser.add_argument("--responses", type=int, default=8, help="K, of a ranking")
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "WIDTH"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.responses < 2 or given.responses * given.batch_size % 2:
        raise ValueError(f"responses {given.responses} x batch_size {given.batch_size}: take at least 2 responses and an even product, "
                         "which is the rows that a forward pass of pairs has too")
    return given


def rankings(tokenizer: Any, count: int, responses: int) -> list[dict[str, Any]]:
    """Encoded questions with worked answers, one's own and others', in random order of merit."""
    from stages.data import curriculum
    from stages.data.tokenizer import END, chat_ids

    rng, end = random.Random(0), tokenizer.convert_tokens_to_ids(END)
    drawn = list(itertools.islice(curriculum.problems(0, split="preferences"), count + responses))
    answers = [[*tokenizer(f" {curriculum.response(p, curriculum.WORKED)}", add_special_tokens=False)["input_ids"], end] for p in drawn]
    return [{"prompt_ids": chat_ids(tokenizer, [{"role": "user", "content": curriculum.user_turn(drawn[i].question, curriculum.WORKED)}],
                                    ask=True),
             "response_ids": answers[i:i + responses], "ranks": rng.sample(range(1, responses + 1), responses)} for i in range(count)]


def one(variant: str, width: int, given: argparse.Namespace) -> dict[str, Any]:
    """Train with one variant in this process: its seconds, what it compared and encoded, and its highest memory (GPU: allocated)."""
    import datasets
    import torch
    import transformers
    from trl import RewardConfig, RewardTrainer

    from reward.model import from_language_model
    from reward.preferences import pairs
    from stages.data import curriculum
    from stages.data.tokenizer import train_tokenizer
    from stages.models.ranking import RankedCollator, RankedRewardTrainer
    from stages.models.sizes import build_decoder, decoder_config

    class StepEnds(transformers.TrainerCallback):
        """Notes when each step ended; the first one also warms up."""

        def on_step_end(self, args, state, control, **kwargs):
            ends.append(time.perf_counter())

    ends: list[float] = []
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    tokenizer = train_tokenizer((row["text"] for row in itertools.islice(curriculum.documents(0), 300)), vocab_size=given.vocab_size)
    rows = rankings(tokenizer, (given.steps + 1) * given.batch_size, given.responses)
    cpu, compared = not torch.cuda.is_available(), [(row, better, worse) for row in rows for better, worse, _ in pairs(row["ranks"])]
    with tempfile.TemporaryDirectory() as folder:
        build_decoder(decoder_config(tokenizer, hidden_size=width, num_layers=given.num_layers, num_heads=max(1, width // 32)),
                      seed=0).save_pretrained(f"{folder}/lm")
        model = from_language_model(f"{folder}/lm", pad_id=tokenizer.pad_token_id, seed=0)
        common: dict[str, Any] = {
            "output_dir": f"{folder}/checkpoints", "max_steps": given.steps + 1, "learning_rate": 1e-4, "use_cpu": cpu, "report_to": "none",
            "dataloader_pin_memory": not cpu, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 10**6, "max_length": None}
        if variant != "RewardTrainer":
            common |= {"bf16": False, "gradient_checkpointing": False}
        if variant in BASELINES:
            micro, parts = given.responses * given.batch_size // 2, given.responses - 1
            trainer: Any = RewardTrainer(model=model, processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(
                [{f"{side}_ids": row["prompt_ids"] + row["response_ids"][i] for side, i in (("chosen", better), ("rejected", worse))}
                 for row, better, worse in compared]), args=RewardConfig(
                     per_device_train_batch_size=micro, gradient_accumulation_steps=parts, **common))
        else:
            trainer = RankedRewardTrainer(
                model=model, processing_class=tokenizer, data_collator=RankedCollator(tokenizer.pad_token_id, variant == "ranked"),
                train_dataset=datasets.Dataset.from_list(rows), heldout=[], muon=None, args=RewardConfig(
                    per_device_train_batch_size=given.batch_size, remove_unused_columns=False, **common))
        trainer.add_callback(StepEnds())
        trainer.train()
    seconds = ends[-1] - ends[0]
    comparisons = given.steps * given.batch_size * given.responses * (given.responses - 1) // 2
    encoded = 2 * comparisons if variant in BASELINES else given.steps * given.batch_size * given.responses
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if cpu else torch.cuda.max_memory_allocated()
    lengths = [len(row["prompt_ids"]) for row in rows], [len(ids) for row in rows for ids in row["response_ids"]]
    return {"variant": variant, "width": width, "seconds": seconds, "comparisons": comparisons, "encoded": encoded,
            "comparisons_per_s": comparisons / seconds, "encoded_per_s": encoded / seconds, "peak_bytes": memory,
            "steps": given.steps, "responses": given.responses, "threads": torch.get_num_threads(),
            "mean_prompt_tokens": statistics.fmean(lengths[0]), "mean_response_tokens": statistics.fmean(lengths[1])}


def summary(runs: Sequence[dict[str, Any]], width: int) -> str:
    """A table of one width: medians over rounds, and ratios within rounds with their lowest and highest."""
    found = {name: [run for run in runs if run["variant"] == name and run["width"] == width] for name in VARIANTS}

    def ratios(name: str, base: str, key: str) -> str:
        each = [run[key] / other[key] for run, other in zip(found[name], found[base], strict=False)]
        return f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})" if each else "-"

    rows = [[name, *(f"{statistics.median(run[f'{key}_per_s'] for run in of):,.0f}" for key in ("comparisons", "encoded")),
             *(ratios(name, base, f"{key}_per_s") for base in BASELINES for key in ("comparisons", "encoded")),
             f"{max(run['peak_bytes'] for run in of) / 2**30:.2f}", VARIANTS[name]] for name, of in found.items() if of]
    return markdown([f"width {width}", "comparisons/s", "responses encoded/s", *(f"{key}, times {base}" for base in BASELINES
                     for key in ("comparisons", "encoded")), "peak GiB", "what it is"], rows)


def bench(argv: list[str], given: argparse.Namespace) -> None:
    if given.one:
        print(json.dumps(one(given.one[0], int(given.one[1]), given)))
        return
    rows = (given.steps + 1) * given.batch_size * given.responses
    times = {"RewardTrainer": 10 * (given.responses - 1), "RewardTrainer, fp32": given.responses - 1}
    seconds = given.rounds * sum(15 + rows * times.get(name, 1) * (width / 128) ** 1.5 * given.num_layers / 160
                                 for width in given.widths for name in given.variants)
    say(f"budget: {given.rounds} rounds of {len(given.variants)} variants at {len(given.widths)} widths, about {clock(seconds)} on a core")
    in_rounds(given, given.widths, lambda name, width: measured(
        f"{name} at width {width}", "stages.evals.bench_reward", *argv, "--one", name, str(width)), summary)


if __name__ == "__main__":
    run_program(lambda given: bench(given, arguments(given)))
