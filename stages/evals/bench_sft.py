"""Benchmark: tokens a second and peak memory of fine-tuning on dialogues of mixed lengths, by how a batch is laid out.

    python -m stages.evals.bench_sft --rounds 3

Every variant trains one epoch on the same dialogues from the same random model in a process of its own, in rounds, so that what slows
the machine slows all of them; speed is in dialogue tokens (padding counts for nothing) and the ratio is of medians within rounds.
`SFTTrainer` is TRL's with its defaults but the batch size and length; `SFTTrainer, fp32` without its mixed precision and recomputation.
"""
import argparse
import itertools
import json
import os
import resource
import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from reward.folders import trusted
from stages.evals.studies import markdown, measured
from stages.run.console import clock
from stages.run.entry import run_program
from stages.run.manifest import Manifest, say

RUNS = os.environ.get("PLUMBLINE_RUNS", "runs")
VARIANTS = {"SFTTrainer": "TRL's trainer with its defaults", "SFTTrainer, fp32": "the same without bf16 and recomputed activations",
            "padded": "this project's, rows padded to the longest of a batch", "flat": "this project's default on CPU: no padding",
            "packed": "this project's, rows of max_length filled with dialogues"}
BASELINES = ("SFTTrainer", "SFTTrainer, fp32")


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.bench_sft", description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="how to train", metavar="VARIANT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-rows", type=int, default=960, help="dialogues")
    parser.add_argument("--few-shot-share", type=float, default=0.3, help="of dialogues with examples as earlier turns: the long ones")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--method", default="lora", choices=["lora", "full"])
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--prepare", default=f"{RUNS}/tiny/prepare", help="finished prepare run, for tokenizer and problems")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def one(variant: str, given: argparse.Namespace) -> dict[str, float]:
    """Train with one variant in this process: seconds, tokens, and the highest memory of the process (GPU: allocated)."""
    import datasets
    import torch
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from stages.data import dialogues, turns
    from stages.models import adapters, finetuning
    from stages.models.finetuning import DialogueCollator, TuningConfig
    from stages.models.forgetting import Watch
    from stages.models.sizes import build_decoder, decoder_config

    datasets.disable_progress_bars()
    prepared = Manifest(given.prepare)
    tokenizer: Any = AutoTokenizer.from_pretrained(trusted(prepared.product("tokenizer")))
    mixture = dialogues.read(dialogues.parse_sources([{"data": "curriculum", "few_shot_share": given.few_shot_share}]),
                             problems=prepared.product("problems"), seed=0, num_rows=given.num_rows, validation_rows=8)
    end_of_text, end = tokenizer.eos_token_id, turns.end_of_turn(tokenizer)
    rows, _, lengths = turns.encode_all(tokenizer, mixture.train, max_length=given.max_length, end_of_text=end_of_text)
    model: Any = build_decoder(decoder_config(tokenizer, hidden_size=given.hidden_size, num_layers=given.num_layers,
                                              num_heads=max(1, given.hidden_size // 32), context_length=given.max_length), seed=0)
    per_step = max(1, round(given.batch_size * lengths.tokens / len(rows) / given.max_length)) if variant == "packed" else given.batch_size
    config = TuningConfig(batch_size=per_step, epochs=1, max_length=given.max_length, packing=variant == "packed", method=given.method,
                          attn_implementation="sdpa" if variant == "padded" else "auto", learning_rate=1e-4)
    peft_config = adapters.adapter_config(config, [], tied=False) if given.method == "lora" else None
    with tempfile.TemporaryDirectory() as folder:
        if variant.startswith("SFTTrainer"):
            plain: dict[str, Any] = {} if variant == "SFTTrainer" else {"bf16": False, "gradient_checkpointing": False}
            chats = [{"prompt": row["messages"][:row["first"]], "completion": row["messages"][row["first"]:]} for row in mixture.train]
            trainer: Any = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(chats),
                                      peft_config=peft_config, args=SFTConfig(
                                          output_dir=folder, per_device_train_batch_size=given.batch_size, num_train_epochs=1,
                                          max_length=given.max_length, learning_rate=1e-4, use_cpu=not torch.cuda.is_available(),
                                          report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=10**6, **plain))
            trainer.train()
        else:
            tokenizer.eos_token_id = end
            watch = Watch(Path(folder) / "watch", validation=rows[:1], sources=["curriculum"],
                          collator=DialogueCollator(tokenizer.pad_token_id), neutral=None, tokens=1)
            trainer = finetuning.tune(model, tokenizer, config, run=SimpleNamespace(directory=Path(folder)), train=rows, watch=watch,
                                      evaluations=1, peft_config=peft_config)
    seconds = next(row["train_runtime"] for row in trainer.state.log_history if "train_runtime" in row)
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "tokens": lengths.tokens, "memory": memory, "longest": lengths.lengths[-1],
            "median_length": lengths.quantile(50)}


def bench(argv: list[str], given: argparse.Namespace) -> None:
    if given.one:
        print(json.dumps(one(given.one, given)))
        return
    say(f"budget: {given.rounds} rounds of {len(given.variants)} variants, about {clock(40 * given.rounds * len(given.variants))}")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in given.variants}
    for number, name in itertools.product(range(given.rounds), given.variants):
        result = measured(name, "stages.evals.bench_sft", *argv, "--one", name)
        found[name].append(result)
        say(f"round {number + 1}, {name}: {result['tokens'] / result['seconds']:,.0f} tokens/s, {result['memory'] / 2**30:.2f} GiB")
    first = next(iter(found.values()))[0]
    say(f"\n{given.num_rows} dialogues, {first['tokens']:,.0f} tokens, half of at most {first['median_length']:.0f} tokens, "
        f"the longest {first['longest']:.0f}; width {given.hidden_size}, {given.num_layers} layers, {given.method}, "
        f"batches of {given.batch_size}")
    rows = []
    for name, runs in found.items():
        speeds = [run["tokens"] / run["seconds"] for run in runs]
        ratios = [[speed / (other["tokens"] / other["seconds"]) for speed, other in zip(speeds, found.get(base, []), strict=False)]
                  for base in BASELINES]
        rows.append([name, f"{statistics.median(speeds):,.0f}", f"{min(speeds):,.0f} to {max(speeds):,.0f}",
                     *(f"{statistics.median(each):.2f}" if each else "-" for each in ratios),
                     f"{max(run['memory'] for run in runs) / 2**30:.2f}", VARIANTS[name]])
    say(markdown(["variant", "tokens/s", "over rounds", *(f"times {base}" for base in BASELINES), "peak GiB", "what it is"], rows))


if __name__ == "__main__":
    run_program(lambda given: bench(given, arguments(given)))
