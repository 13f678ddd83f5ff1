"""Benchmark: how fast the corpus is read, screened, tokenised and packed, and whether memory stays flat as it grows.

    python -m stages.evals.bench_prepare --megabytes 10 1000

Each size is a text file made for it and deleted afterwards, prepared by `stages.prepare` in a process of its own: words of a Zipf
distribution over 200,000 (as English has it, roughly), three in a hundred numbers, one paragraph in fifty a near copy of an earlier
one. Speed is given by wall time and by processor time, which counts all threads and is the steadier on a shared machine; memory is the
process's highest, beside what it held before the first document.
"""
import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.evals.studies import markdown
from stages.run.entry import run_program
from stages.run.manifest import say

MB, MIB = 10**6, 1 << 20
VOCABULARY, NUMBERS, PARAGRAPH, COPIES = 200_000, 0.03, 80, 0.02
SCREENS = {"plain": {}, "screened": {"near_duplicates": "drop", "quality": {"min_stop_words": 0}}}
HEADER = ["text", "settings", "tokens", "reading, MB/s", "a processor-s", "near-duplicates, MB a processor-s", "tokens/s", "a processor-s",
          "whole stage, wall s", "processor s", "peak MiB", "above its start"]


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.bench_prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", nargs="+", type=int, default=[10, 1000], help="sizes of the text, in millions of bytes")
    parser.add_argument("--settings", nargs="+", choices=list(SCREENS), default=list(SCREENS), metavar="NAME",
                        help="plain: defaults; screened: near-duplicates and quality rules, too")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--folder", type=Path, help="where text and tokens are written for a while (default: the temporary folder)")
    parser.add_argument("--one", nargs=2, metavar=("TEXT", "NAME"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def write_text(path: Path, size: int) -> None:
    """Text of about `size` bytes."""
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "b ch d f g h k l m n p r s st t v w".split() for b in "a e i o u ai en or".split()]
    made = {"".join(rng.choice(syllables, rng.integers(1, 6))) for _ in range(2 * VOCABULARY)}
    words = np.array(sorted(made, key=lambda word: (len(word) + rng.random() * 3, word))[:VOCABULARY], dtype=object)  # the short ones first
    share = 1 / (np.arange(len(words)) + 2.7)
    share = np.cumsum(share / share.sum())
    kept: list[str] = []
    written = 0
    with path.open("w", encoding="utf-8") as f:
        while written < size:
            drawn = words[np.searchsorted(share, rng.random((1000, PARAGRAPH))).clip(max=len(words) - 1)]
            numbers = rng.random(drawn.shape) < NUMBERS
            drawn[numbers] = [str(n) for n in rng.integers(0, 10_000, numbers.sum())]
            for row, copied in zip(drawn.tolist(), rng.random(1000) < COPIES, strict=True):
                if copied and kept:
                    row[:] = [*kept[rng.integers(len(kept))].split(" ")[:-1], row[0]]
                text = " ".join(row)
                kept = [*kept[-99:], text] if not copied else kept
                written += f.write(text + ".\n\n")


def one(text: Path, name: str, vocab_size: int) -> dict[str, Any]:
    """Prepare the text in this process: what the manifest says of it, and memory before and at its highest."""
    from stages.prepare import PrepareConfig, main
    from stages.run.config import build_config

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    manifest = main(build_config(PrepareConfig, {
        "run_dir": str(text.with_suffix(".prepare")), "sources": [str(text)], "num_problems": {}, "vocab_size": vocab_size,
        "heldout_share": 0.01, **SCREENS[name]}))
    notes = manifest.data["notes"]
    return {"bytes": text.stat().st_size, "settings": name, "seconds": notes["seconds"], "dropped": notes["dropped"],
            "tokens": manifest.counts["train_tokens"] + manifest.counts["heldout_tokens"],
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "before": before}


def row_of(result: dict[str, Any]) -> list[str]:
    seconds, size, tokens = result["seconds"], result["bytes"] / MB, result["tokens"]
    near = seconds.get("near-duplicates")
    return [f"{size:,.0f} MB", result["settings"], f"{tokens:,}",
            *(f"{size / seconds['reading'][clock]:.1f}" for clock in ("wall", "processor")),
            f"{size / near['processor']:.1f}" if near else "-",
            *(f"{tokens / seconds['tokens'][clock]:,.0f}" for clock in ("wall", "processor")),
            *(f"{sum(each[clock] for each in seconds.values()):,.0f}" for clock in ("wall", "processor")),
            f"{result['peak'] / MIB:,.0f}", f"{(result['peak'] - result['before']) / MIB:,.0f}"]


def main(argv: list[str]) -> None:
    given = arguments(argv)
    if given.one:
        print(json.dumps(one(Path(given.one[0]), given.one[1], given.vocab_size)), flush=True)
        return
    rows = []
    for size in given.megabytes:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            text = Path(folder) / "text.txt"
            write_text(text, size * MB)
            for name in given.settings:
                done = subprocess.run([sys.executable, "-m", "stages.evals.bench_prepare", "--one", str(text), name, "--vocab-size",
                                       str(given.vocab_size)], capture_output=True, text=True)
                if done.returncode:
                    raise ValueError(f"{size} MB, {name}, failed: {done.stderr[-2000:]}")
                rows.append(row_of(json.loads(done.stdout.splitlines()[-1])))
                say(" | ".join(rows[-1]))
    say(markdown(HEADER, rows))


if __name__ == "__main__":
    run_program(main)
