"""Teach a pretrained model to answer in turns: full or LoRA tuning through TRL's SFTTrainer, which knows what it taught and what it forgot.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m stages.sft --config recipes/tiny/sft.yaml
"""
import itertools
import math
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
from transformers import AutoTokenizer

from reward.folders import trusted
from stages.data import corpora, dialogues, turns
from stages.data.instructions import instructions
from stages.data.overlap import screened
from stages.data.packing import replayed
from stages.data.problems import read_problems
from stages.data.tokenizer import ASSISTANT, END, SYSTEM, USER, document_end
from stages.evals.battery import changes, exam, summary
from stages.evals.scoring import write_records
from stages.evals.tasks import load_task
from stages.models import adapters, engines, finetuning
from stages.models.counts import count_parameters, train_flops_per_token
from stages.models.finetuning import DialogueCollator, TuningConfig, tune
from stages.models.forgetting import STEP_IN_FORWARDS, Watch, base_text
from stages.models.heldout import measured, ratio, summarised
from stages.models.training import barrier, export, save_model
from stages.models.verdict import forgotten, transferred, verdict
from stages.run.config import option
from stages.run.console import clock, table
from stages.run.entry import launch
from stages.run.manifest import Manifest, Run, hash_data, hash_path, is_main, metric, say

SHOWN_DROPS = 3


@dataclass(frozen=True, kw_only=True)
class SftConfig(TuningConfig):
    STAGE = "sft"
    PARENTS = ("prepare", "pretrain")

    sources: list[dict[str, Any]] = option([{"data": "curriculum"}], "what is taught, each {data: curriculum, instructions, a file, "
                                           "folder, glob or hub id; weight, format, columns, ...} (docs/sft.md)")
    num_rows: int = option(3000, "training dialogues, divided over the sources by weight (0: all that files and hub datasets have)")
    validation_rows: int = option(300, "dialogues of the validation set (of files: the last of each)")
    bad_rows: Literal["stop", "drop"] = option("stop", "a row that cannot be trained on: stop there, or leave it out, count and list it")
    repeats: Literal["report", "drop", "ignore"] = option("report", "near-duplicates among training rows, and rows that hold a question "
                                                          "of an evaluation set: count and list, leave out too, or do not look")
    evaluation_sets: list[str] = option([], "sets to look for in the training rows, as format:source; benchmarks and validation are anyway",
                                        recorded_only=True)
    completion_only: bool = option(True, "loss on the assistant's turns alone (false: on all of a dialogue)")
    order: Literal["mixed", "sequence"] = option("mixed", "sequence: one source after the other; what later ones cost "
                                                  "earlier ones is measured")
    replay_share: float = option(0.0, "tokens of pretraining text mixed in, as a share of the dialogues', against forgetting")
    average: float = option(1.0, "weight of the tuned model in the average with its base that becomes the product, against forgetting")
    adapter: str | None = option(None, "folder of a LoRA adapter of this base to go on training")
    evaluations: int = option(5, "looks at validation loss and forgetting over the run, each with a checkpoint")
    watch_share: float = option(0.06, "what these looks may cost, as a share of the training's work; it sets how many rows they read")
    patience: int = option(2, "looks in a row above the lowest validation loss, beyond noise, that end the training (0: never)")
    keep: Literal["recommended", "last"] = option("recommended", "checkpoint that becomes the product; recommended: of those that "
                                                  "learned as much as the best, the one that forgot least")
    forgetting_rows: int = option(96, "held-out rows of the base corpus measured before and after (0: none)")
    probe_prompts: int = option(200, "validation problems answered before and after, for format, stopping and accuracy (0: none)")
    instruction_prompts: int = option(60, "exact instructions (count, case, order) given before and after (0: none)")
    benchmarks: list[str] = option([], "benchmarks answered before and after, as format:source (test problems stay for evaluation)",
                                   recorded_only=True)
    benchmark_problems: int = option(100, "problems of each benchmark (0: all)")
    max_new_tokens: int = option(96, "longest answer in these")


def main(config: SftConfig) -> Manifest:
    began = time.time()
    check(config)
    sources = dialogues.parse_sources(config.sources, "sources")
    tasks = [load_task(spec, problems=Path(), difficulties=[], num_problems=config.benchmark_problems, seed=config.seed)
             for spec in config.benchmarks]
    evaluation_sets = [load_task(spec, problems=Path(), difficulties=[], num_problems=0, seed=0) for spec in config.evaluation_sets]
    if len({task.name for task in tasks}) < len(tasks) or len({task.name for task in evaluation_sets}) < len(evaluation_sets):
        raise ValueError(f"two sets of one name ({config.benchmarks}, {config.evaluation_sets}): name them apart, as in a=gsm8k:a.jsonl")
    run = Run(config, inputs=corpora.hash_inputs([s.data for s in sources if s.data not in dialogues.GENERATED])
              | ({"adapter": hash_path(Path(config.adapter))} if config.adapter and Path(config.adapter).exists() else {})
              | {f"evaluation set {task.name}": hash_data(task.rows) for task in evaluation_sets}
              | {f"benchmark {task.name}": hash_data(task.rows) for task in tasks})
    if run.finished:
        return run.manifest
    prepared, parent = run.parents["prepare"], run.parents["pretrain"]
    tokenizer: Any = AutoTokenizer.from_pretrained(trusted(parent.product("model")))
    end, end_of_text = turns.end_of_turn(tokenizer), document_end(tokenizer)
    model: Any = adapters.load_base(parent.product("model"), config)
    finetuning.check_fit(tokenizer, model, config)

    problems = prepared.product("problems")
    mixture = dialogues.read(sources, problems=problems, seed=config.seed, num_rows=config.num_rows,
                             validation_rows=config.validation_rows, bad_rows=config.bad_rows)
    asked_elsewhere = [row["question"] for task in [*tasks, *evaluation_sets] for row in task.rows]
    rows, found = (mixture.train, []) if config.repeats == "ignore" else screened(
        mixture.train, mixture.validation, asked_elsewhere, generated=[s.name for s in sources if s.data in dialogues.GENERATED],
        drop=config.repeats == "drop")
    train, cut, lengths = turns.encode_all(tokenizer, rows, max_length=config.max_length, end_of_text=end_of_text,
                                           completion_only=config.completion_only)
    validation, cut_validation, _ = turns.encode_all(tokenizer, mixture.validation, max_length=config.max_length, end_of_text=end_of_text,
                                                     completion_only=config.completion_only)
    dropped = [*mixture.dropped, *(row for row in found if config.repeats == "drop"), *cut, *cut_validation]
    tell(run, mixture.counts, dropped, [] if config.repeats == "drop" else found, lengths)
    unwatched = {s.name for s in sources} - {row["source"] for row in validation}
    if config.order == "sequence" and unwatched:
        raise ValueError(f"order: sequence measures every source, but {sorted(unwatched)[0]} has no validation rows: raise validation_rows "
                         f"({config.validation_rows}) or its weight")
    if not train or not validation:
        raise ValueError(f"{len(train)} training and {len(validation)} validation dialogues are left of {len(rows)}: "
                         f"see {run.directory}/findings.jsonl, or raise max_length ({config.max_length})")
    validation = dialogues.in_turn(validation, config.seed)
    datasets.disable_progress_bars()
    datasets.disable_caching()  # the cache is keyed by the pickled function, not by what it calls

    new = [token for token in (SYSTEM, USER, ASSISTANT, END) if token in tokenizer.get_vocab()]
    fresh = bool(new) and parent.data["stage"] == "pretrain"
    neutral = base_text(prepared, model, tokenizer, rows=config.forgetting_rows, pad_id=tokenizer.pad_token_id)

    def examine(model: Any) -> dict[str, Any]:
        """The same exam in the chat format and, as far as it asks for skill, in that of the pretraining text."""
        asked = read_problems(problems / "validation.jsonl")[:config.probe_prompts] if config.probe_prompts else []
        drawn = itertools.islice(instructions(config.seed, split="validation"), 4 * config.instruction_prompts)  # some come again
        orders = list({row["id"]: row for row in drawn}.values())[:config.instruction_prompts]
        ask = partial(exam, model, tokenizer, problems=asked, instructions=orders, benchmarks=tasks, seed=config.seed,
                      max_new_tokens=config.max_new_tokens)
        if not (asked or orders or tasks):
            return {}
        chat, plain = ask(chat=True, stop_ids=[end]), ask(chat=False, stop_ids=[end, end_of_text])
        return chat | {f"plain/{name}": column for name, column in plain.items() if not name.endswith("rate")}

    def prepare(base: Any) -> None:
        if fresh:
            adapters.give_meaning(base, tokenizer)

    prepare(model)
    before = examine(model)
    start = {name: weight.clone() for name, weight in model.state_dict().items()} if config.average < 1 else {}
    base_hash = parent.data["products"]["model"]["sha256"]
    peft_config = None
    if config.adapter:
        model = adapters.load_adapter(model, config.adapter, base_hash)
    elif config.method != "full":
        peft_config = adapters.adapter_config(config, tokenizer.convert_tokens_to_ids(new), model.config.tie_word_embeddings)

    blocks = [[row for row in train if row["source"] == s.name] for s in sources] if config.order == "sequence" else [train]
    text = [] if not config.replay_share else replayed(
        datasets.load_from_disk(str(prepared.product("tokens") / "train")), tokens=config.replay_share * lengths.tokens, seed=config.seed,
        longest=config.max_length, eos_id=end_of_text, pad_id=tokenizer.pad_token_id)
    blocks = [[*block, *text[number::len(blocks)]] for number, block in enumerate(blocks)]
    schedule, ends = finetuning.in_blocks(blocks, config.epochs, config.seed) if config.order == "sequence" else (blocks[0], [])
    boundaries = [max(1, rows_so_far // config.batch_size) for rows_so_far in ends]
    trained_tokens = sum(len(row["input_ids"]) for row in schedule) * (1 if ends else config.epochs)
    collator = DialogueCollator(tokenizer.pad_token_id)
    watch = Watch(run.directory / "watch", validation=validation, sources=[str(row["source"]) for row in validation], collator=collator,
                  neutral=neutral, tokens=config.watch_share * STEP_IN_FORWARDS * trained_tokens / (config.evaluations + max(1, len(ends))))
    tokenizer.eos_token_id = end  # from here on a turn, not a document, is what the model ends
    training_began = time.time()
    trainer = tune(model, tokenizer, config, run=run, train=schedule, watch=watch, evaluations=config.evaluations, peft_config=peft_config,
                   in_order=bool(ends), look_at=boundaries[:-1], patience=config.patience)
    training, num_trainable = time.time() - training_began, trainer.num_trainable

    last = trainer.state.global_step
    recommended, equal = trainer.recommended()
    kept = recommended if config.keep == "recommended" else last
    trainer.load_step(kept)
    trained = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    peft = hasattr(trained, "peft_config")
    adapter_name = "adapter" if config.average == 1 else "adapter_unaveraged"  # on its base it is the model before the average
    if peft and is_main():
        adapters.save_adapter(trained, run.directory / "adapter", base_hash)
    barrier()
    product = adapters.merged(trained, config, parent.product("model"), run.directory / "adapter", prepare)
    if config.average < 1:
        finetuning.average(product, start, config.average)
    product.config.eos_token_id = product.generation_config.eos_token_id = end
    product.generation_config.pad_token_id = tokenizer.pad_token_id
    if peft:
        save_model(product, tokenizer, run.directory / "model")
    else:
        export(trainer, tokenizer, run.directory / "model")

    learned = measured(product, validation, collator)
    shares = Counter(row["source"] for row in validation)  # the gap is between the same mixtures
    seen = measured(product, [row for name, n in shares.items() for row in [r for r in train if r["source"] == name][:n]], collator)
    (loss, error), (loss_seen, error_seen) = (ratio([row[0] for row in rows], [int(row[2]) for row in rows]) for rows in (learned, seen))
    gap, reach = loss - loss_seen, 1.96 * math.hypot(error, error_seen)
    metrics = {"validation_loss": summarised(learned)["heldout_loss"], "training_loss": summarised(seen)["heldout_loss"],
               "validation_gap": metric(gap, n=int(sum(row[2] for row in learned)), ci95=(gap - reach, gap + reach))}
    if len(sources) > 1:
        metrics |= {f"validation_loss/{name}": summarised([row for row, of in zip(learned, validation, strict=True)
                                                           if of["source"] == name])["heldout_loss"]
                    for name in shares}
    if divided := engines.divides_weights(trainer):
        say("no exam after training: this engine holds the weights in parts; `make evaluation` asks the saved model")
    after = {} if divided else examine(product)
    metrics |= summary(before, "before") | summary(after, "after") | changes(before, after)
    if neutral:
        metrics |= forgotten(neutral.before, neutral.look(product))
    if ends:
        metrics |= transferred(watch, [s.name for s in sources], [*boundaries[:-1], last])
    verdict(run.directory, watch, kept=kept, recommended=recommended, equal=equal, started=fresh)
    for name in ("format_rate", "stop_rate", "instructions", "worked_accuracy", "plain/worked_accuracy"):
        if name in before and name in after:
            say(f"{name}: {metrics[f'before/{name}']['value']:.3f} before, {metrics[f'after/{name}']['value']:.3f} after")
    overhead = watch.seconds / max(1e-9, training - watch.seconds)
    say(f"watching took {watch.seconds:.1f} s, {overhead:.1%} of the {training - watch.seconds:.1f} s of training; reading, and measuring "
        f"before and after, {clock(time.time() - began - training)}")
    counts = count_parameters(product)
    tokens = int(trained_tokens * last / max(1, trainer.state.max_steps))
    per_token = train_flops_per_token(product.config, max(1, lengths.tokens // len(train)), counts)
    return run.finish(
        metrics=metrics, products={"model": "model"} | ({adapter_name: "adapter"} if peft else {}),
        counts={"dialogues": len(train), "validation_dialogues": len(validation), "replayed_documents": len(text), "tokens": tokens,
                "loss_tokens": lengths.loss_tokens, "cut": lengths.cut_rows, "dropped": len(dropped), "steps": last, "kept_step": kept,
                "skipped_steps": trainer.num_skipped, "parameters": counts["total"], "trainable_parameters": num_trainable,
                "flops": tokens * per_token * 2 // 3 if peft else tokens * per_token},  # of frozen matrices no gradient is computed
        notes={"recommended_step": recommended, "as_good_steps": equal, "sources": mixture.counts,
               "watch": {"seconds": watch.seconds, "share_of_training": overhead, "validation_rows": watch.count,
                         "base_rows": watch.neutral_count}})


def check(config: SftConfig) -> None:
    """Raises ValueError for settings that cannot work together, before anything is read."""
    if not 0 < config.average <= 1 or config.replay_share < 0:
        raise ValueError(f"average {config.average} must lie above 0 and at most at 1, replay_share {config.replay_share} at 0 or above")
    if config.evaluations < 1:
        raise ValueError(f"evaluations {config.evaluations}: set it to 1 or more, since a look at the end says what was learned")
    if config.average < 1 and config.method == "qlora":
        raise ValueError("average: a base in 4 bits has no weights to average with: set method: lora, or average: 1")
    if config.adapter and config.method == "full":
        raise ValueError(f"method full has no use for the adapter {config.adapter}: set method: lora, or leave the adapter out")
    if config.order == "sequence" and (config.packing or len(config.sources) < 2):
        raise ValueError("order: sequence needs two sources or more, and packing off (packed rows mix them)")


def tell(run: Run, counts: dict[str, dict[str, int]], dropped: list[dict], found: list[dict], lengths: turns.Lengths) -> None:
    """What is trained on, what was left out and why, before training starts; every row left out or found is in findings.jsonl."""
    columns = ("read", "filtered", "dropped", "train", "repeated", "validation")
    say(table(["source", *columns], [[name, *(f"{of[key]:,}" for key in columns)] for name, of in counts.items()]))
    for rows, what in ((dropped, "left out"), (found, "found, and kept")):
        for row in rows[:SHOWN_DROPS]:
            say(f"{what}: {row['where']}: {row['reason']}")
        if len(rows) > SHOWN_DROPS:
            say(f"{what}: {len(rows):,} rows in all, listed in {run.directory.name}/findings.jsonl")
    for line in lengths.lines():
        say(line)
    if is_main():
        write_records(run.directory / "findings.jsonl", [{**row, "dropped": out}
                                                         for rows, out in ((dropped, True), (found, False)) for row in rows])


if __name__ == "__main__":
    launch(main, SftConfig)
