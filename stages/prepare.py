"""Raw text to packed token shards, a tokenizer and disjoint problem sets.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m stages.prepare --config recipes/tiny/prepare.yaml
"""
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import disable_progress_bars

from reward.folders import trusted
from stages.data import corpora, curriculum, entropy
from stages.data.documents import Documents, Drops, check_sources, check_weights, gather, in_order, mixture, texts
from stages.data.overlap import contamination, drop_near_duplicates
from stages.data.packing import pack, save_rows
from stages.data.problems import load_problems, read_problems, split_spec
from stages.data.quality import Rules, language_fault
from stages.data.tokenizer import CHAT_TEMPLATE, check_vocabulary, encoder, fertility, hash_tokenizer, train_tokenizer
from stages.run.config import StageConfig, fill, option
from stages.run.console import Timer, progress
from stages.run.entry import launch
from stages.run.manifest import Manifest, Run, hash_data, hash_path, metric, say
from stages.run.workers import spread

BATCH = 128  # documents tokenised at once
FERTILITY_DOCUMENTS = 200  # of each source, in which numbers are looked at


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
    weights: dict[str, float] = option({}, "by source, its share of the training text: less than it has is a sample, more repeats it",
                                       added=True)
    train_bytes: int = option(0, "training text that a mixture by weights makes (0: as much as its sources hold)", added=True)
    near_duplicates: Literal["keep", "drop"] = option("keep", "drop documents that nearly repeat an earlier one (MinHash)", added=True)
    quality: dict[str, Any] | None = option(None, "drop what does not read like text: {} for the rules of Gopher, {rule: threshold} to "
                                            "change some (docs/corpus.md)", added=True)
    languages: list[str] = option([], "keep documents in these languages, as [en, de] (empty: all; needs py3langid)", added=True)
    decontaminate: Literal["off", "report", "drop"] = option("report", "training documents that hold a question of an evaluation set: "
                                                             "count and show them, drop them too, or do not look", added=True)
    workers: int | None = option(None, "processes that read, screen and tokenise (default: as many as cores; 1: this one alone)",
                                 recorded_only=True)
    evaluation_sets: list[str] = option([], "sets to look for beside the recipe's own problems, as format:source", recorded_only=True)


def main(config: PrepareConfig) -> Manifest:
    if not 0 < config.heldout_share <= 1:
        raise ValueError(f"heldout_share {config.heldout_share:g} is a share of the documents: set it between 0 and 1, for instance to 0.1")
    if config.tokenizer is None:
        check_vocabulary(config.vocab_size)
    check_weights(config.weights, config.sources, config.train_bytes)
    evaluated = {split_spec(spec)[0]: load_problems(spec, hub_split="test") for spec in config.evaluation_sets}
    if len(evaluated) < len(config.evaluation_sets):
        raise ValueError(f"two evaluation_sets of one name ({', '.join(config.evaluation_sets)}): name them apart, as in a=gsm8k:a.jsonl")
    generator = {"curriculum": hash_path(Path(curriculum.__file__)), "entropy": hash_path(Path(entropy.__file__)),
                 "chat_template": hash_data(CHAT_TEMPLATE)}
    run = Run(config, inputs=generator | corpora.hash_inputs(config.sources) | hash_tokenizer(config.tokenizer)
              | {f"evaluation set {name}": hash_data(rows) for name, rows in evaluated.items()})
    if run.finished:
        return run.manifest
    disable_progress_bars()
    shutil.rmtree(run.directory / "tokens", ignore_errors=True)  # what a killed attempt left
    timer = Timer()

    write_problems(config, run.directory / "problems")
    documents, drops = Documents(run.directory), Drops()
    with timer("reading"):
        gather(read(config), documents, drops, heldout_share=config.heldout_share, min_chars=config.min_chars,
               faults=faults(config), workers=config.workers)
    if config.near_duplicates == "drop":
        with timer("near-duplicates"):
            drop_near_duplicates(documents, drops, config.workers)
    with timer("contamination"):
        found = find_overlap(config, documents, drops, evaluated | own_sets(config, run.directory / "problems"))
    for line in drops.lines():
        say(line)
    drops.write(run.directory / "dropped.jsonl")
    check_sources(config.sources, documents, drops)

    times, epochs = mixture(documents, config.weights, config.train_bytes, config.seed)
    order = in_order(times, config.seed)
    with timer("tokenizer"):
        tokenizer = make_tokenizer(config, documents, order)
        tokenizer.save_pretrained(run.directory / "tokenizer")
    say(f"tokenizer: {len(tokenizer)} tokens, numbers {config.numbers}")
    encode = encoder(tokenizer, own=config.tokenizer is None)
    with timer("tokens"):
        counts, tokens = write_tokens(config, documents, order, tokenizer, encode, run.directory / "tokens")
    counts = {"vocabulary": len(tokenizer), "documents": len(documents), **counts}

    metrics = {"kept_share": metric(len(documents) / drops.read.total(), n=drops.read.total())}
    sources = {source: describe(source, documents, order, tokenizer, tokens, metrics) for source in dict.fromkeys(config.sources)}
    for source, passes in epochs.items():
        sources[source]["epochs"] = passes
        say(f"{source}: {passes:.2f} epochs" + ("; warning: beyond 4 repeated text teaches little (Muennighoff et al. 2023): lower its "
                                                "weight or train_bytes" if passes > 4 else ""))
    metrics |= {f"contamination/{name}": metric(each["found"] / max(1, each["questions"]), n=each["questions"])
                for name, each in found.items()}
    if config.sources == ["curriculum"]:
        held = order[(documents.columns["heldout"][order] == 1) & (documents.columns["easy"][order] == 0)]
        ids = [[*row.tolist(), tokenizer.eos_token_id] for row in encode(list(texts(documents, held)))]
        metrics["text_entropy"] = metric(entropy.token_nats(ids, entropy.document_nats(config.seed)), n=len(ids))
        say(f"entropy of the generated text: {metrics['text_entropy']['value']:.4f} nats a token, the least mean loss there can be")
    kinds = Counter(documents.columns["kind"].tolist())
    return run.finish(
        metrics=metrics, counts=counts,
        products={"tokens": "tokens", "tokenizer": "tokenizer", "problems": "problems", "dropped": "dropped.jsonl"},
        notes={"dropped": dict(drops.reasons), "kinds": {documents.names[kind]: count for kind, count in kinds.items()},
               "row_length": config.row_length, "sources": sources, "contamination": found, "seconds": timer.seconds,
               "dropped_by_source": {source: dict(reasons) for source, reasons in drops.by_source.items()}})


def read(config: PrepareConfig) -> Iterator[dict[str, str]]:
    for source in config.sources:
        for document in corpora.read_documents(
                source, seed=config.seed, num_documents=config.num_documents, num_easy_documents=config.num_easy_documents,
                text_column=config.text_column, hub_config=config.hub_config, hub_split=config.hub_split,
                document_chars=config.document_chars, decode_errors=config.decode_errors):
            yield {**document, "source": source}


def faults(config: PrepareConfig) -> list[Callable[[str], str | None]]:
    rules = [] if config.quality is None else [Rules(**fill(Rules, config.quality, where="quality")).fault]
    return rules + ([language_fault(config.languages)] if config.languages else [])


def own_sets(config: PrepareConfig, problems: Path) -> dict[str, list[dict[str, Any]]]:
    """The recipe's own problems that are asked but not learned from."""
    return {f"problems/{split}": read_problems(problems / f"{split}.jsonl") for split in ("validation", "test") if
            config.num_problems.get(split)}


def find_overlap(config: PrepareConfig, documents: Documents, drops: Drops, sets: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    if config.decontaminate == "off" or set(config.sources) == {"curriculum"} or not sets:
        return {}
    questions = {name: [row["question"] for row in rows] for name, rows in sets.items()}
    found = contamination(documents, drops, questions, passed_over="curriculum", drop=config.decontaminate == "drop",
                          workers=config.workers)
    for name, each in found.items():
        say(f"contamination: {each['found']:,} of {each['questions']:,} questions of {name} stand in {each['documents']:,} "
            "training documents")
    return found


def describe(source: str, documents: Documents, order: np.ndarray, tokenizer: Any, tokens: np.ndarray, metrics: dict[str, Any],
             ) -> dict[str, Any]:
    """What a source gave (documents, bytes and tokens as they were written, repeats included), and how the tokenizer cuts its text."""
    own = order[documents.of(source)[order]]
    size, count = int(documents.columns["size"][own].sum()), int(tokens[documents.number(source)])
    metrics[f"bytes_per_token/{source}"] = metric(size / count, n=count)
    said = f"{source}: {size / count:.2f} bytes a token"
    if tokenizer.is_fast:
        pieces, numbers, digits = fertility(tokenizer, list(texts(documents, own[:FERTILITY_DOCUMENTS])))
        if numbers:
            metrics[f"tokens_per_number/{source}"] = metric(pieces / numbers, n=numbers)
            metrics[f"tokens_per_digit/{source}"] = metric(pieces / digits, n=digits)
            said += f", {pieces / numbers:.2f} tokens a number"
    say(said)
    return {"documents": len(own), "bytes": size, "tokens": count}


def make_tokenizer(config: PrepareConfig, documents: Documents, order: np.ndarray) -> Any:
    if config.tokenizer is None:
        candidates = order if config.weights else np.arange(len(documents))  # of a mixture a sample, else the first there are
        training = candidates[documents.columns["heldout"][candidates] == 0][:config.tokenizer_documents]
        return train_tokenizer(texts(documents, training), vocab_size=config.vocab_size, numbers=config.numbers,
                               context_length=config.row_length)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trusted(config.tokenizer), trust_remote_code=False)  # else a hub id may ask
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(f"tokenizer {config.tokenizer} has no padding token of its own: packing would never train its end of text; "
                         "add one with tokenizer.add_special_tokens({'pad_token': '<|pad|>'})")
    return tokenizer


def write_tokens(config: PrepareConfig, documents: Documents, order: np.ndarray, tokenizer: Any, encode: Callable, folder: Path,
                 ) -> tuple[dict[str, int], np.ndarray]:
    """Packed rows of each part, and of each kind of held-out text; counts, and tokens by source (end-of-text tokens left out)."""
    columns, tokens, counts = documents.columns, np.zeros(len(documents.names), dtype=np.int64), dict[str, int]()
    parts = {part: order[(columns["easy"][order] == easy) & (columns["heldout"][order] == heldout)]
             for part, (easy, heldout) in {"train-easy": (1, 0), "train": (0, 0), "heldout": (0, 1)}.items()}
    if empty := [part for part in ("train", "heldout") if not len(parts[part])]:
        raise ValueError(f"no document fell into {empty[0]}: give more text, or change heldout_share ({config.heldout_share})")
    batches = {part: [positions[at:at + BATCH] for at in range(0, len(positions), BATCH)] for part, positions in parts.items()}

    def encoded(positions: np.ndarray) -> tuple[np.ndarray, list[int]]:
        rows = encode(list(texts(documents, positions)))
        return np.concatenate(rows), [len(ids) for ids in rows]

    work = spread(encoded, itertools.chain.from_iterable(batches.values()), config.workers)

    def rows_of(part: str) -> Iterator[list[int]]:
        for batch, (ids, lengths) in progress(itertools.islice(work, len(batches[part])), f"tokens of {part}", total=len(batches[part])):
            np.add.at(tokens, columns["source"][batch], lengths)
            for start, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
                yield ids[start:end].tolist()

    def packed(rows: Iterable[list[int]]) -> Iterator[list[int]]:
        return pack(rows, config.row_length, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)

    for part, positions in parts.items():
        if len(positions):
            before = int(tokens.sum())
            made = save_rows(packed(rows_of(part)), config.row_length, folder / part, vocab_size=len(tokenizer))
            count = int(tokens.sum()) - before + len(positions)
            counts |= {f"{part}_documents": len(positions), f"{part}_rows": made, f"{part}_tokens": count}
            say(f"{part}: {len(positions):,} documents, {count:,} tokens in {made:,} rows ({count / (made * config.row_length):.1%} full)")
    kinds = np.unique(columns["kind"])
    for kind in kinds if len(kinds) > 1 else ():  # the loss on each kind of text shows what a mean hides: which skill came, and when
        chosen = order[(columns["heldout"][order] == 1) & (columns["kind"][order] == kind)][:config.kind_documents]
        if len(chosen):
            rows = packed(ids.tolist() for ids in encode(list(texts(documents, chosen))))
            save_rows(rows, config.row_length, folder / "heldout-kinds" / documents.names[kind], vocab_size=len(tokenizer))
    return counts, tokens


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
