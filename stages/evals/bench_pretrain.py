"""Benchmark: tokens a second of pretraining, the share of the machine's own matrix-product rate that they come to, and where a step goes.

    python -m stages.evals.bench_pretrain --rounds 3
    python -m stages.evals.bench_pretrain --launch fsdp2 --sizes 1b --variants adamw             (make bench-gpu)

Every variant trains the same packed rows of the curriculum with the trainer of stages.pretrain, each in a process of its own; rounds go
over all of them. `transformers` is its plain Trainer on its own decoder, AdamW, rows read as one text each.

Model FLOP utilisation (MFU) is the FLOPs of stages/models/counts.py, 6 a matmul parameter and the whole square of attention, over what the
machine would do in that time by products of two large square fp32 matrices (on a GPU: bf16). What Muon multiplies does not count. After
each step the same process multiplies such matrices, and those of the decoder's own linear layers, forward and backward: so the ratio
holds on a machine that others slow down, too. `ceiling` is the rate of the decoder's own shapes over that of the square ones.
Sizes are width x layers, or recipes by name: decoder, row length, vocabulary and rows a pass and device are theirs, a step is one pass.
With `--launch` each run goes through `accelerate launch` with that config of recipes/accelerate, on all GPUs (cpu-2: two processes), in its
precision; speeds are of all devices, MFU, TFLOP/s and memory of one (GPU: allocated by the training; CPU: the process's).
Wall time says what a user waits; processor time, all threads, is the steadier with one thread on a shared machine.
"""
import argparse
import itertools
import json
import resource
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stages.evals.studies import in_rounds, markdown, measured
from stages.models.sizes import of_size
from stages.run.console import clock
from stages.run.entry import fix_arithmetic, run_program, start_processes, take_one_gpu
from stages.run.manifest import say
from stages.run.phases import Phases

ADAMW = {"optimizer": "adamw", "learning_rate": 1e-3}
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "muon": ({}, "the default: Muon and AdamW, attention within documents"),
    "adamw": (ADAMW, "AdamW for all"),
    "adamw, sdpa": (ADAMW | {"attn_implementation": "sdpa"}, "the same under a mask"),
    "adamw, eager": (ADAMW | {"attn_implementation": "eager"}, "the same, written out"),
    "adamw, compile": (ADAMW | {"torch_compile": True}, "torch.compile"),
    "adamw, sdpa, compile": (ADAMW | {"attn_implementation": "sdpa", "torch_compile": True}, "torch.compile of all, under a mask"),
    "muon, bf16": ({"bf16": True}, "autocast to bf16, Muon's products too"),
    "adamw, bf16": (ADAMW | {"bf16": True}, "autocast to bf16"),
    "adamw, bf16, compile": (ADAMW | {"bf16": True, "torch_compile": True}, "both"),
    "adamw, documents, compile": (ADAMW | {"attn_implementation": "documents", "torch_compile": True}, "attention within documents, on a "
                                  "GPU by one kernel, and torch.compile"),
    "transformers": (ADAMW | {"attn_implementation": "sdpa"}, "plain Trainer and decoder; documents see one another")}
PHASES, RATES = ("data", "forward", "backward", "optimizer"), "rates"
ARGUMENTS = ("torch_compile", "bf16")  # of Trainer; the rest are a PretrainConfig's
SQUARE = 2048  # rows of the large matrices; on a GPU four times as many


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.bench_pretrain", description=__doc__.splitlines()[0])
    usual = [name for name in VARIANTS if "documents" not in name]  # what attention is on a CPU anyway
    parser.add_argument("--variants", nargs="+", default=usual, choices=list(VARIANTS), help="who trains", metavar="VARIANT")
    parser.add_argument("--sizes", nargs="+", default=["64x4", "128x4", "256x4"], help="of the decoders: width x layers, heads of 32; or "
                        "a recipe's name")
    parser.add_argument("--launch", help="a config of recipes/accelerate (default: this machine, without a launcher)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="that are timed, in each run, after --warmup")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--row-length", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens a step")
    parser.add_argument("--micro-rows", type=int, help="rows a pass and device of recipes (default: the recipe's)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    for size in given.sizes:
        of_size(size)
    if given.launch and not Path(f"recipes/accelerate/{given.launch}.yaml").is_file():
        known = sorted(path.stem for path in Path("recipes/accelerate").glob("*.yaml"))
        raise ValueError(f"launch {given.launch!r}: choose from {', '.join(known)}")
    for name in ("rounds", "steps", "warmup", "threads"):
        if getattr(given, name) < 1:
            raise ValueError(f"{name} is at least 1, got {getattr(given, name)}")
    if given.batch_tokens % given.row_length:
        raise ValueError(f"batch_tokens {given.batch_tokens} is not a multiple of row_length {given.row_length}: choose one that is")
    return given


class Clocks:
    """Wall and processor seconds (the latter of all threads) of pieces of work, summed by name."""

    def __init__(self, wait: Callable[[], None]):
        self.wait = wait
        self.wall: dict[Any, float] = defaultdict(float)
        self.processor: dict[Any, float] = defaultdict(float)

    def time(self, name: Any, work: Callable[[], Any]) -> None:
        self.wait()
        wall, processor = time.perf_counter(), time.process_time()
        work()
        self.wait()
        self.wall[name] += time.perf_counter() - wall
        self.processor[name] += time.process_time() - processor


class Rates:
    """The machine's rate of matrix products: `measure` multiplies once, `square` and `own` are FLOPs a second by the clock asked for."""

    def __init__(self, model: Any, tokens: int, device: Any, wait: Callable[[], None]):
        import torch
        from torch import nn

        gpu = device.type == "cuda"
        make = {"device": device, "dtype": torch.bfloat16 if gpu else torch.float32}
        self.size, self.tokens, self.clocks, self.times = SQUARE * (4 if gpu else 1), tokens, Clocks(wait), 0
        self.shapes = Counter(tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear))
        self.squares = torch.randn(self.size, self.size, **make), torch.randn(self.size, self.size, **make)
        self.operands = {(o, i): (torch.randn(tokens, i, **make), torch.randn(o, i, **make), torch.randn(tokens, o, **make))
                         for o, i in self.shapes}

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensors in (self.squares, *self.operands.values()) for tensor in tensors)

    def measure(self) -> None:
        self.times += 1
        self.clocks.time("square", lambda: self.squares[0] @ self.squares[1])
        for shape, (x, weight, grad) in self.operands.items():
            self.clocks.time(shape, lambda x=x, w=weight, g=grad: (x @ w.t(), g @ w, g.t() @ x))  # type: ignore[misc]

    def square(self, clock: str) -> float:
        return 2 * self.size ** 3 * self.times / getattr(self.clocks, clock)["square"]

    def own(self, clock: str) -> float:
        flops = sum(count * 6 * self.tokens * o * i for (o, i), count in self.shapes.items())
        return flops * self.times / sum(count * getattr(self.clocks, clock)[shape] for shape, count in self.shapes.items())


def make_trainer(variant: str, size: str, given: argparse.Namespace, folder: str) -> tuple[Any, int, int]:
    """A trainer of the variant on a random decoder, FLOPs a token, and tokens a step of all processes."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from stages.data import curriculum
    from stages.data.packing import PackedCollator, pack, to_dataset
    from stages.data.tokenizer import train_tokenizer
    from stages.models.counts import train_flops_per_token
    from stages.models.pretraining import PretrainConfig, PretrainTrainer, attention_of
    from stages.models.sizes import build_decoder, decoder_of
    from stages.models.training import keep_memory, share_batch, training_arguments, world_size
    from stages.run.config import build_config

    of, settings = of_size(size), dict(VARIANTS[variant][0])
    more = {name: settings.pop(name) for name in ARGUMENTS if name in settings}
    row_length, vocab_size = of.pop("row_length", given.row_length), of.pop("vocab_size", 0)
    config = build_config(PretrainConfig, of | settings, recipe="tiny")
    rows = (given.micro_rows or config.micro_batch_rows or config.batch_tokens // row_length) if vocab_size else share_batch(
        given.batch_tokens // row_length, world_size(), "batch_tokens / row_length")
    steps, rows_a_step = given.warmup + given.steps, rows * world_size()
    texts = [row["text"] for row in itertools.islice(curriculum.documents(0), 300 + steps * rows_a_step * row_length // 40)]
    tokenizer = train_tokenizer(texts[:300], vocab_size=1024)
    ids: dict[str, Any] = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
    packed = itertools.islice(pack(tokenizer(texts)["input_ids"], row_length, **ids), steps * rows_a_step)
    data = to_dataset(packed, row_length, vocab_size=len(tokenizer))
    if len(data) != steps * rows_a_step:
        raise ValueError(f"the curriculum's documents fill {len(data)} rows of {steps * rows_a_step}: ask for fewer steps")
    decoder = decoder_of(config, tokenizer, row_length)
    decoder.vocab_size = max(decoder.vocab_size, -(-vocab_size // 16) * 16)
    args = TrainingArguments(**training_arguments(
        SimpleNamespace(directory=Path(folder)), seed=0, logging_steps=10**6, save_steps=10**6, save_strategy="no",  # type: ignore[arg-type]
        max_steps=steps, per_device_train_batch_size=rows, learning_rate=config.learning_rate, warmup_steps=1,
        train_sampling_strategy="sequential", gradient_checkpointing=config.gradient_checkpointing, **more))
    common = {"args": args, "train_dataset": data}
    if variant == "transformers":
        def collate(rows: list[dict]) -> dict[str, Any]:
            batch = torch.tensor([row["input_ids"] for row in rows])
            return {"input_ids": batch, "labels": batch}

        trainer: Any = Trainer(model=AutoModelForCausalLM.from_config(decoder, attn_implementation="sdpa"), data_collator=collate, **common)
    else:
        keep_memory()
        trainer = PretrainTrainer(model=build_decoder(decoder, seed=0, attn_implementation=attention_of(config)),
                                  data_collator=PackedCollator(**ids), config=config, heldout_rows=data, **common)
    return trainer, train_flops_per_token(decoder, row_length), rows_a_step * row_length


def one(variant: str, size: str, given: argparse.Namespace) -> dict[str, Any]:
    """Train with one variant in this process: speeds, MFU by both clocks, shares of the phases in the time of a step."""
    import torch
    import transformers

    from stages.models.training import check_engine, world_size

    class Watch(transformers.TrainerCallback):
        """Restarts the clocks after the warm-up, measures the machine after each step, and times the optimizer."""

        def on_pre_optimizer_step(self, *_, **__):
            phases.start("optimizer")

        def on_optimizer_step(self, *_, **__):
            phases.stop()

        def on_step_end(self, args, state, control, **__):
            memory.append(torch.cuda.max_memory_allocated() - rates.bytes if gpu else
                          resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            if state.global_step <= given.warmup:
                rates.measure()
            if state.global_step == given.warmup:
                rates.clocks, rates.times, began[:] = Clocks(wait), 0, [time.perf_counter(), time.process_time()]
                phases.restart()
            elif state.global_step > given.warmup:
                phases.start(RATES)
                rates.measure()
                phases.stop()
                ended[:] = time.perf_counter(), time.process_time()
            if gpu:
                torch.cuda.reset_peak_memory_stats()

    transformers.logging.disable_progress_bar()
    torch.set_num_threads(given.threads)
    began, ended, memory = [0.0, 0.0], [0.0, 0.0], list[int]()
    with tempfile.TemporaryDirectory() as folder:
        trainer, flops_a_token, batch_tokens = make_trainer(variant, size, given, folder)
        check_engine(trainer)
        gpu = trainer.args.device.type == "cuda"
        wait = torch.cuda.synchronize if gpu else lambda: None
        phases = Phases((*PHASES, RATES), wait, time.perf_counter if gpu else time.process_time)
        rates = Rates(trainer.model, batch_tokens // world_size(), trainer.args.device, wait)
        with phases.undo:
            phases.time(trainer, "get_batch_samples", "data")
            phases.time(trainer, "compute_loss", "forward")
            phases.time(trainer.accelerator, "backward", "backward")
            phases.time(trainer, "_clip_grad_norm", "optimizer")
            phases.time(trainer.model, "zero_grad", "optimizer")
            trainer.add_callback(Watch())
            trainer.train()
    tokens = given.steps * batch_tokens
    spent = {name: end - start - sum(getattr(rates.clocks, name).values())
             for name, start, end in zip(("wall", "processor"), began, ended, strict=True)}
    of_phases = spent["wall" if gpu else "processor"]
    split = {name: phases.seconds[name] / of_phases for name in PHASES}
    return {"variant": variant, "size": size, "shares": split | {"rest": 1 - sum(split.values())},
            **{f"tokens_per_{name}_s": tokens / seconds for name, seconds in spent.items()},
            **{f"mfu_{name}": tokens * flops_a_token / world_size() / seconds / rates.square(name) for name, seconds in spent.items()},
            **{f"ceiling_{name}": rates.own(name) / rates.square(name) for name in spent},
            "tflops_a_device": tokens * flops_a_token / world_size() / spent["wall"] / 1e12, "peak_bytes": max(memory[given.warmup:]),
            "launch": given.launch, "devices": world_size(), "tokens_a_step": batch_tokens,
            "square_flops_per_processor_s": rates.square("processor"), "flops_per_token": flops_a_token,
            "loss": trainer.state.log_history[-1]["train_loss"], "threads": torch.get_num_threads(), "device": str(trainer.args.device),
            "torch": torch.__version__, "transformers": transformers.__version__}


def summary(runs: Sequence[dict[str, Any]], size: str) -> str:
    """A table of one size: medians over rounds, with lowest and highest of the MFU."""
    rows = []
    for name, (_, text) in VARIANTS.items():
        of = [run for run in runs if (run["variant"], run["size"]) == (name, size)]
        if not of:
            continue
        def middle(key: str, of: Sequence[dict[str, Any]] = of) -> float:
            return statistics.median(run[key] for run in of)

        rows.append([name, f"{middle('tokens_per_wall_s'):,.0f}", f"{middle('tokens_per_processor_s'):,.0f}",
                     *(f"{middle(f'mfu_{by}'):.2f} ({min(run[f'mfu_{by}'] for run in of):.2f} to {max(run[f'mfu_{by}'] for run in of):.2f})"
                       for by in ("wall", "processor")), f"{middle('ceiling_processor'):.2f}", f"{middle('tflops_a_device'):.3g}",
                     f"{max(run['peak_bytes'] for run in of) / 2**30:.2f}",
                     *(f"{statistics.median(run['shares'][phase] for run in of):.1%}" for phase in (*PHASES, "rest")), text])
    return markdown([f"size {size}", "tokens/s", "tokens/processor-s", "MFU", "MFU by processor time", "ceiling", "TFLOP/s", "peak GiB",
                     *PHASES, "rest", "what it is"], rows)


def launcher(name: str | None) -> list[str]:
    """What stands between this interpreter and the module: nothing, or accelerate with a launch config on all GPUs. Raises ValueError where
    that asks for a GPU and none is there."""
    if name is None:
        return []
    import torch

    gpus = torch.cuda.device_count()
    if not gpus and not name.startswith("cpu"):
        raise ValueError(f"launch {name} needs a GPU, and torch sees none here: run this on a machine that has one (docs/gpus.md)")
    count = {"cpu": 1, "cpu-bf16": 1, "cpu-2": 2, "gpu": 1}.get(name, gpus)
    return ["-m", "accelerate.commands.launch", "--config_file", f"recipes/accelerate/{name}.yaml", "--num_processes",
            str(count)]


def bench(given: argparse.Namespace, argv: Sequence[str]) -> None:
    if given.one:
        fix_arithmetic()
        (start_processes if given.launch else take_one_gpu)()
        variant, size = given.one
        return say(json.dumps(one(variant, size, given)))
    launch = launcher(given.launch)
    tokens = (given.warmup + given.steps) * given.batch_tokens
    seconds = given.rounds * sum(60 + 90 * ("compile" in name) if "row_length" in of else  # a recipe's, on a GPU
                                 25 + 90 * ("compile" in name) + tokens * of["hidden_size"] ** 1.5 * of["num_layers"] / 4e7
                                 for of in map(of_size, given.sizes) for name in given.variants)
    say(f"budget: {given.rounds} rounds of {len(given.variants)} variants at {len(given.sizes)} sizes, about {clock(seconds)}")
    in_rounds(given, given.sizes, lambda name, size: measured(
        f"{name} at size {size}", "stages.evals.bench_pretrain", *argv, "--one", name, size, launch=launch,
        OMP_NUM_THREADS=str(given.threads)), summary)


if __name__ == "__main__":
    run_program(lambda argv: bench(arguments(argv), argv))
