"""Raw text to packed token shards, a tokenizer and disjoint problem sets.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m stages.prepare --config recipes/tiny/prepare.yaml
"""
import itertools
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datasets import Dataset, disable_progress_bars

from stages.data import corpora, curriculum, entropy
from stages.data.packing import pack, to_dataset
from stages.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from stages.run.config import StageConfig, option
from stages.run.console import progress
from stages.run.entry import launch
from stages.run.manifest import Manifest, Run, hash_data, hash_path, metric, say


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(StageConfig):
    STAGE = "prepare"

    sources: list[str] = option(["curriculum"], "documents: `curriculum`, local files, folders or globs, hub dataset ids")
    text_column: str = option("text", "column of the text in jsonl, json, parquet and hub rows")
    hub_config: str | None = option(None, "configuration of the hub dataset")
    hub_split: str = option("train", "split of the hub dataset")
    num_documents: int = option(40_000, "documents of the curriculum, or at most this many of a hub dataset (0: all)")
    num_easy_documents: int = option(8_000, "documents of the curriculum's easy beginning")
    num_problems: dict[str, int] = option(
        {"sft": 6000, "preferences": 10_000, "ppo": 10_000, "validation": 3000, "test": 12_000}, "embedded problems a split")
    difficulties: list[int] = option([1, 2, 3, 4, 5], "steps of the embedded problems")
    document_chars: int = option(4000, "plain text is cut into documents of at most this many characters")
    decode_errors: Literal["strict", "replace"] = option("strict", "what to do with bytes that are not UTF-8")
    heldout_share: float = option(0.1, "share of documents held out, decided by their hash")
    min_chars: int = option(1, "shorter documents are dropped")
    vocab_size: int = option(1024, "largest vocabulary; BPE stops early when nothing is left to merge")
    numbers: Literal["whole", "digits"] = option("whole", "how numbers are split into tokens")
    tokenizer: str | None = option(None, "a local folder or hub id of a tokenizer to use instead of training one")
    tokenizer_documents: int = option(20_000, "documents the tokenizer is trained on")
    kind_documents: int = option(300, "held-out documents of each kind, measured apart where there are several kinds")
    row_length: int = option(512, "tokens a packed row; the context length of pretraining")


def main(config: PrepareConfig) -> Manifest:
    generator = {"curriculum": hash_path(Path(curriculum.__file__)), "entropy": hash_path(Path(entropy.__file__)),
                 "chat_template": hash_data(CHAT_TEMPLATE)}
    run = Run(config, inputs=generator | corpora.hash_inputs(config.sources) | hash_tokenizer(config.tokenizer))
    if run.finished:
        return run.manifest
    disable_progress_bars()

    drops = corpora.Drops()
    documents = list(progress(read(config, drops), "reading"))
    for line in drops.lines():
        say(line)
    if not documents:
        raise ValueError(f"no document is left of {', '.join(config.sources)}: see what was dropped above")

    tokenizer = make_tokenizer(config, [d["text"] for d in documents if not d["heldout"]])
    tokenizer.save_pretrained(run.directory / "tokenizer")
    say(f"tokenizer: {len(tokenizer)} tokens, numbers {config.numbers}")

    random.Random(config.seed).shuffle(documents)
    counts: dict[str, int] = {"vocabulary": len(tokenizer), "documents": len(documents)}
    kinds: Counter[str] = Counter()
    parts = {"train-easy": ("easy", False), "train": ("main", False), "heldout": ("main", True)}
    for part, (phase, heldout) in parts.items():
        texts = [d["text"] for d in documents if d["phase"] == phase and d["heldout"] == heldout]
        if not texts:
            if part == "train-easy":
                continue
            raise ValueError(f"no document fell into {part}: give more text, or change heldout_share ({config.heldout_share})")
        dataset = tokens_of(texts, tokenizer, config.row_length, part)
        dataset.save_to_disk(run.directory / "tokens" / part)
        counts[f"{part}_documents"], counts[f"{part}_rows"] = len(texts), len(dataset)
        counts[f"{part}_tokens"] = sum(int((row != tokenizer.pad_token_id).sum()) for row in dataset.with_format("numpy")["input_ids"])
        filled = counts[f"{part}_tokens"] / (len(dataset) * config.row_length)
        say(f"{part}: {len(texts):,} documents, {counts[f'{part}_tokens']:,} tokens in {len(dataset):,} rows ({filled:.1%} full)")
    kinds.update(d["kind"] for d in documents)
    if len(kinds) > 1:  # the loss on each kind of text shows what a mean hides: which skill came, and when
        for kind in kinds:
            texts = [d["text"] for d in documents if d["heldout"] and d["kind"] == kind][:config.kind_documents]
            if texts:
                tokens_of(texts, tokenizer, config.row_length, kind).save_to_disk(run.directory / "tokens" / "heldout-kinds" / kind)

    write_problems(config, run.directory / "problems")
    metrics = {"kept_share": metric(len(documents) / drops.read, n=drops.read)}
    if config.sources == ["curriculum"]:
        texts = [d["text"] for d in documents if d["heldout"] and d["phase"] == "main"]
        ids = [[*row, tokenizer.eos_token_id] for row in tokenizer(texts)["input_ids"]]
        metrics["text_entropy"] = metric(entropy.token_nats(ids, entropy.document_nats(config.seed)), n=len(texts))
        say(f"entropy of the generated text: {metrics['text_entropy']['value']:.4f} nats a token, the least mean loss there can be")
    return run.finish(
        metrics=metrics, counts=counts,
        products={"tokens": "tokens", "tokenizer": "tokenizer", "problems": "problems"},
        notes={"dropped": dict(drops.reasons), "kinds": dict(kinds), "row_length": config.row_length})


def read(config: PrepareConfig, drops: corpora.Drops):
    documents = itertools.chain.from_iterable(corpora.read_documents(
        source, seed=config.seed, num_documents=config.num_documents, num_easy_documents=config.num_easy_documents,
        text_column=config.text_column, hub_config=config.hub_config, hub_split=config.hub_split,
        document_chars=config.document_chars, decode_errors=config.decode_errors) for source in config.sources)
    return corpora.select(documents, drops, heldout_share=config.heldout_share, min_chars=config.min_chars)


def hash_tokenizer(source: str | None) -> dict[str, str | None]:
    """What a tokenizer's folder or hub id holds, for the fingerprint. Weights beside it do not count: they can be gigabytes."""
    if source is None:
        return {}
    folder = Path(source)
    if not folder.is_dir():
        return {"tokenizer": corpora.known_revision(source, "model")}
    return {"tokenizer": hash_data({str(p.relative_to(folder)): hash_path(p) for p in sorted(folder.rglob("*"))
                                    if p.is_file() and p.suffix not in (".safetensors", ".bin", ".pt", ".pth", ".gguf")})}


def make_tokenizer(config: PrepareConfig, texts: list[str]):
    if config.tokenizer is None:
        return train_tokenizer(texts[:config.tokenizer_documents], vocab_size=config.vocab_size, numbers=config.numbers,
                               context_length=config.row_length)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(f"tokenizer {config.tokenizer} has no padding token of its own: packing would never train its end of text; "
                         "add one with tokenizer.add_special_tokens({'pad_token': '<|pad|>'})")
    return tokenizer


def tokens_of(texts: list[str], tokenizer, row_length: int, what: str) -> Dataset:
    batches = (tokenizer(texts[i:i + 1000])["input_ids"] for i in progress(range(0, len(texts), 1000), f"tokens of {what}"))
    rows = pack(itertools.chain.from_iterable(batches), row_length, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)
    return to_dataset(rows, row_length, vocab_size=len(tokenizer))


def write_problems(config: PrepareConfig, folder: Path) -> None:
    """Problems of each split as jsonl, each question once."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in config.num_problems.items():
        seed, drawn_from = (config.seed + (1 << 21), "train") if split == "sft" else (config.seed, split)  # SFT may repeat pretraining
        source = curriculum.problems(seed, split=drawn_from, difficulties=tuple(config.difficulties))
        chosen: dict[str, dict] = {}
        for problem in progress(itertools.islice(source, 20 * count), f"problems of {split}", total=count):
            chosen.setdefault(problem.id, problem.as_row())
            if len(chosen) >= count:
                break
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in chosen.values())


if __name__ == "__main__":
    launch(main, PrepareConfig, distributed=False)
