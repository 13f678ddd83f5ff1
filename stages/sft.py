"""Teach a pretrained model to answer in turns: LoRA through TRL's SFTTrainer, with an eye on overfitting and forgetting.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m stages.sft --config recipes/tiny/sft.yaml
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig as TrlSftConfig
from trl import SFTTrainer

from prompts.answers import equal, extract
from prompts.intervals import wilson
from stages.data import dialogues
from stages.data.curriculum import CUES, user_turn
from stages.data.packing import PackedCollator
from stages.data.problems import read_problems
from stages.data.tokenizer import ASSISTANT, END, EOS, SYSTEM, USER, chat_ids
from stages.models.heldout import heldout
from stages.models.sampling import prompt_key, sample
from stages.models.training import Resumable, barrier, export, fit, gather, rank, save_model, share_batch, training_arguments, world_size
from stages.run import figures
from stages.run.checkpoint import read_metrics
from stages.run.config import StageConfig, option
from stages.run.entry import launch
from stages.run.manifest import Manifest, Run, is_main, metric, say


@dataclass(frozen=True, kw_only=True)
class SftConfig(StageConfig):
    STAGE = "sft"
    PARENTS = ("prepare", "pretrain")

    data: str = option("curriculum", "`curriculum`, a local jsonl, json or parquet file, or a hub dataset id")
    prompt_column: str = option("prompt", "column of the prompt: text or messages")
    completion_column: str = option("completion", "column of the completion: text or messages")
    hub_config: str | None = option(None, "configuration of the hub dataset")
    hub_split: str = option("train", "split of the hub dataset")
    num_rows: int = option(3000, "training dialogues (files and hub: at most; 0: all)")
    validation_rows: int = option(300, "dialogues of the validation set (files and hub: taken off the end)")
    worked_share: float = option(0.7, "share of the curriculum's dialogues with worked steps")
    few_shot_share: float = option(0.15, "share of the curriculum's dialogues that begin with worked examples as earlier turns")
    max_length: int = option(512, "tokens of the longest dialogue; longer ones are cut and counted")
    method: Literal["lora", "full"] = option("lora", "lora: adapters on all linear layers; full: all weights")
    lora_rank: int = option(16, "rank of the adapters")
    lora_alpha: int = option(32, "scale of the adapters")
    learning_rate: float = option(2e-3, "peak learning rate (full tuning wants about a tenth)")
    epochs: float = option(2.0, "passes over the training dialogues")
    batch_size: int = option(16, "dialogues a step, over all processes")
    micro_batch_size: int | None = option(None, "dialogues a forward pass and process (default: all)")
    warmup_share: float = option(0.05, "share of the steps with a rising learning rate; it then falls linearly")
    packing: bool = option(False, "pack dialogues into rows of max_length (needs flash attention: transformers says when it is missing)")
    evaluations: int = option(5, "validation measurements over the run")
    probe_prompts: int = option(200, "validation problems answered before and after, for format, stopping and accuracy")
    max_new_tokens: int = option(96, "longest answer in those")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    forgetting_rows: int = option(96, "held-out rows of the base corpus measured before and after (0: none)")


class ResumableSFTTrainer(Resumable, SFTTrainer):
    """SFTTrainer whose validation loss is a mean over tokens; Trainer's own is one over batches and moves with their division."""

    validated_at = -1

    def evaluate(self, *args, **kwargs):
        measured = heldout(self.model, self.eval_dataset, self.data_collator)
        self.validation, self.validated_at = measured["heldout_loss"], self.state.global_step
        logs = {"eval_loss": self.validation["value"], "eval_mean_token_accuracy": measured["heldout_accuracy"]["value"]}
        self.model.eval()  # by this SFTTrainer.log tells training from evaluation
        self.log(logs)
        self.model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs


def main(config: SftConfig) -> Manifest:
    run = Run(config, inputs={} if config.data == "curriculum" else dialogues.corpora.hash_inputs([config.data]))
    if run.finished:
        return run.manifest
    prepared, pretrained = run.parents["prepare"], run.parents["pretrain"]
    tokenizer = AutoTokenizer.from_pretrained(pretrained.product("model"))
    model = AutoModelForCausalLM.from_pretrained(pretrained.product("model"), dtype="auto")
    check_template(tokenizer, model)

    train, validation = read(config, prepared)
    lengths = [len(chat_ids(tokenizer, r["prompt"] + r["completion"])) for r in train]
    cut = sum(n > config.max_length for n in lengths)
    say(f"sft: {len(train):,} dialogues, {sum(lengths):,} tokens, longest {max(lengths)}; "
        f"{cut} longer than {config.max_length} will be cut")
    datasets.disable_progress_bars()
    datasets.disable_caching()  # the cache is keyed by the pickled function, not by what it calls

    problems: list[dict] = []
    if config.probe_prompts:
        problems = read_problems(prepared.product("problems") / "validation.jsonl")
    base_rows = datasets.load_from_disk(str(prepared.product("tokens") / "heldout"))
    base_rows = base_rows.select(range(min(config.forgetting_rows, len(base_rows))))
    collator = PackedCollator(eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)
    forgetting_before = heldout(model, base_rows, collator)["heldout_loss"] if config.forgetting_rows else None
    give_meaning(model, tokenizer)
    before = probe(model, tokenizer, problems[:config.probe_prompts], config)

    local_batch = share_batch(config.batch_size, world_size(), "batch_size")
    micro = min(config.micro_batch_size or local_batch, local_batch)
    if local_batch % micro:
        raise ValueError(f"{local_batch} dialogues a process do not divide into micro batches of {micro}: "
                         "set micro_batch_size to a divisor")
    steps = max(1, int(len(train) / config.batch_size * config.epochs))
    tokenizer.eos_token = END  # from here on a turn, not a document, is what the model ends
    trainer = ResumableSFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(train),
        eval_dataset=datasets.Dataset.from_list(validation),
        peft_config=adapter(config, tokenizer, model.config.tie_word_embeddings) if config.method == "lora" else None,
        args=TrlSftConfig(**training_arguments(
            run, seed=config.seed, report_to=config.report_to, logging_steps=max(1, steps // 25),
            save_steps=max(1, steps // 5), per_device_train_batch_size=micro, per_device_eval_batch_size=max(micro, 8),
            gradient_accumulation_steps=local_batch // micro, learning_rate=config.learning_rate, lr_scheduler_type="linear",
            warmup_steps=max(1, int(steps * config.warmup_share)), num_train_epochs=config.epochs, max_length=config.max_length,
            completion_only_loss=True, packing=config.packing, eval_strategy="steps", eval_steps=max(1, steps // config.evaluations),
            gradient_checkpointing=config.gradient_checkpointing, max_grad_norm=1.0, weight_decay=0.0)))
    fit(trainer)

    if trainer.validated_at != trainer.state.global_step:
        trainer.evaluate()
    final = trainer.validation
    trained = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    if config.method == "lora" and is_main():
        trained.save_pretrained(run.directory / "adapter")
    barrier()
    merged = trained.merge_and_unload() if config.method == "lora" else trained
    set_stops(merged, tokenizer)
    if config.method == "lora":
        save_model(merged, tokenizer, run.directory / "model")
    else:
        export(trainer, tokenizer, run.directory / "model")
    after = probe(merged, tokenizer, problems[:config.probe_prompts], config)

    logged = read_metrics(run.directory / "metrics.jsonl")
    train_loss = [row["train/loss"] for row in logged if "train/loss" in row][-5:]
    metrics = {"validation_loss": final, "validation_gap": metric(final["value"] - sum(train_loss) / len(train_loss), n=final["n"])}
    metrics |= {f"before/{k}": v for k, v in before.items()} | {f"after/{k}": v for k, v in after.items()}
    if forgetting_before:
        forgetting = heldout(merged, base_rows, collator)["heldout_loss"]
        metrics |= {"before/base_loss": forgetting_before, "after/base_loss": forgetting}
        say(f"base corpus: held-out loss {forgetting_before['value']:.4f} before, {forgetting['value']:.4f} after")
    for name in ("format_rate", "stop_rate"):
        if name in before:
            say(f"{name}: {before[name]['value']:.3f} before, {after[name]['value']:.3f} after")
    if is_main():
        show(run.directory, logged)
    return run.finish(metrics=metrics, products={"model": "model"} | ({"adapter": "adapter"} if config.method == "lora" else {}),
                      counts={"dialogues": len(train), "tokens": int(sum(lengths) * config.epochs), "cut": cut,
                              "steps": trainer.state.global_step})


def read(config: SftConfig, prepared: Manifest) -> tuple[list[dict], list[dict]]:
    """Training and validation dialogues. The curriculum has its own splits; of a file the end is held out."""
    if config.data == "curriculum":
        def rows(split: str, count: int) -> list[dict[str, Any]]:
            known = read_problems(prepared.product("problems") / f"{split}.jsonl")
            return dialogues.curriculum_rows(known, seed=config.seed, count=count, worked_share=config.worked_share,
                                             few_shot_share=config.few_shot_share)
        return rows("sft", config.num_rows), rows("validation", config.validation_rows)
    rows_ = dialogues.file_rows(config.data, prompt_column=config.prompt_column, completion_column=config.completion_column,
                                hub_config=config.hub_config, hub_split=config.hub_split,
                                limit=config.num_rows + config.validation_rows if config.num_rows else 0)
    if len(rows_) <= config.validation_rows:
        raise ValueError(f"{config.data} has {len(rows_)} rows, not more than validation_rows {config.validation_rows}: lower it")
    return rows_[:-config.validation_rows], rows_[-config.validation_rows:]


def check_template(tokenizer, model) -> None:
    if tokenizer.chat_template is None or END not in tokenizer.get_vocab():
        raise ValueError(f"the tokenizer has no chat template with {END}: take that of stages.prepare, or give this one a template")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens but the model only {model.config.vocab_size}: they do not match")


@torch.no_grad()
def give_meaning(model, tokenizer) -> None:
    """Start the chat tokens, which pretraining never saw, where the words stand that did their work in "Question: ... Answer: ...".

    From random rows the adapters first have to undo the noise, and what the base could do is lost on the way (LOG.md).
    Averaging over the words' tokens follows Hewitt 2021 (Initializing new word embeddings).
    """
    ends = [model.get_input_embeddings().weight] + ([] if model.config.tie_word_embeddings else [model.get_output_embeddings().weight])
    for token, word in {SYSTEM: "Question", USER: "Question", ASSISTANT: ":", END: EOS}.items():
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        for weight in ends:
            weight[tokenizer.convert_tokens_to_ids(token)] = weight[ids].mean(0)


def adapter(config: SftConfig, tokenizer, tied: bool) -> LoraConfig:
    """LoRA on all linear layers; the chat tokens, never seen in pretraining, train at both ends.

    The head trains whole: TRL multiplies by `lm_head.weight` itself, so rows trained through peft's wrapper would be passed over.
    """
    turns = tokenizer.convert_tokens_to_ids([SYSTEM, USER, ASSISTANT, END])
    return LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM",
                      trainable_token_indices={"embed_tokens": turns}, modules_to_save=None if tied else ["lm_head"])


def set_stops(model, tokenizer) -> None:
    end = tokenizer.convert_tokens_to_ids(END)
    model.config.eos_token_id = end
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, tokenizer.pad_token_id


def probe(model, tokenizer, problems: list[dict], config: SftConfig) -> dict[str, dict]:
    """Greedy answers to validation problems in the chat format: does it keep the format, stop, and answer right."""
    metrics: dict[str, dict] = {}
    if not problems:
        return metrics
    end = tokenizer.convert_tokens_to_ids(END)
    mine = problems[rank()::world_size()]
    counts = {"format_rate": 0, "stop_rate": 0}
    for style in CUES:
        prompts = [chat_ids(tokenizer, [{"role": "user", "content": user_turn(p["question"], style)}], ask=True) for p in mine]
        drawn = sample(model, prompts, keys=[(prompt_key(p["id"]), 0) for p in mine], seed=config.seed, temperature=0.0,
                       max_new_tokens=config.max_new_tokens, eos_ids=[end], pad_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(drawn, skip_special_tokens=True)
        flags = gather([(ids[-1] == end, text.strip().endswith(".") and text.count("The answer is") == 1,
                         equal(extract(text) or "", p["answer"])) for ids, text, p in zip(drawn, texts, mine, strict=True)])
        counts["stop_rate"] += sum(f[0] for f in flags)
        counts["format_rate"] += sum(f[0] and f[1] for f in flags)
        right = sum(f[2] for f in flags)
        metrics[f"{style}_accuracy"] = metric(right / len(flags), n=len(flags), ci95=wilson(right, len(flags)))
    total = len(CUES) * len(problems)
    return metrics | {name: metric(count / total, n=total, ci95=wilson(count, total)) for name, count in counts.items()}


def show(directory: Path, logged: list[dict]) -> None:
    figures.lines(directory / "figures" / "loss.png", {
        label: ([r["step"] for r in logged if key in r], [r[key] for r in logged if key in r])
        for label, key in (("training", "train/loss"), ("validation", "eval/loss"))}, x="step", y="loss (nats a completion token)")


if __name__ == "__main__":
    launch(main, SftConfig)
