"""Benchmark: how fast the corpus is read, screened, tokenised and packed, and whether memory stays flat as it grows.

    python -m stages.evals.bench_prepare --megabytes 10 1000

Each size is a text file made for it and deleted afterwards, prepared by `stages.prepare` in a process of its own: words of a Zipf
distribution over 200,000 (as English has it, roughly), three in a hundred numbers, one paragraph in fifty a near copy of an earlier
one. Speed is given by wall time and by processor time, which counts all threads and workers and is the steadier on a shared machine;
memory is the highest of the process and its workers together, looked at twice a second, with what they share counted once (PSS).
"""
import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from stages.evals.studies import markdown
from stages.run.entry import run_program
from stages.run.manifest import Manifest, say

MB, MIB = 10**6, 1 << 20
VOCABULARY, NUMBERS, PARAGRAPH, COPIES = 200_000, 0.03, 80, 0.02
SCREENS: dict[str, dict[str, Any]] = {"plain": {}, "screened": {"near_duplicates": "drop", "quality": {"min_stop_words": 0}}}
HEADER = ["text", "settings", "tokens", "reading, MB/s", "a processor-s", "near-duplicates, MB a processor-s", "tokens/s", "a processor-s",
          "whole stage, wall s", "processor s", "peak MiB"]


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.bench_prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", nargs="+", type=int, default=[10, 1000], help="sizes of the text, in millions of bytes")
    parser.add_argument("--settings", nargs="+", choices=list(SCREENS), default=list(SCREENS), metavar="NAME",
                        help="plain: defaults; screened: near-duplicates and quality rules, too")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--workers", default="null", help="processes of the stage (default: as many as cores; 1: itself alone)")
    parser.add_argument("--folder", type=Path, help="where text and tokens are written for a while (default: the temporary folder)")
    return parser.parse_args(argv)


def write_text(path: Path, size: int) -> None:
    """Text of about `size` bytes."""
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "b ch d f g h k l m n p r s st t v w".split() for b in "a e i o u ai en or".split()]
    possible = {"".join(rng.choice(syllables, rng.integers(1, 6))) for _ in range(2 * VOCABULARY)}
    made = sorted(sorted(possible), key=lambda word: (len(word) + rng.random() * 3, word))  # the short ones first; a set's order is chance
    words = np.array(made[:VOCABULARY], dtype=object)
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


def memory(pid: int) -> int:
    """Bytes of a process and its children."""
    total = 0
    with contextlib.suppress(psutil.Error):  # gone by now
        for each in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            total += each.memory_full_info().pss
    return total


def prepared(text: Path, name: str, vocab_size: int, workers: str) -> dict[str, Any]:
    """Prepare the text in a process of its own: what the manifest says of it, and the most memory that was seen."""
    folder = text.with_suffix(".prepare")
    settings: dict[str, Any] = {"run_dir": str(folder), "sources": [str(text)], "num_problems": {}, "vocab_size": vocab_size,
                                "heldout_share": 0.01, "workers": workers, **SCREENS[name]}
    flags = [part for key, value in settings.items() for part in (f"--{key}", value if isinstance(value, str) else json.dumps(value))]
    stage, peak = subprocess.Popen([sys.executable, "-m", "stages.prepare", *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                   text=True), 0
    while stage.returncode is None:
        try:
            said = stage.communicate(timeout=0.5)[1]
        except subprocess.TimeoutExpired:
            peak = max(peak, memory(stage.pid))
    if stage.returncode:
        raise ValueError(f"{text}, {name}, failed: {said[-2000:]}")
    manifest = Manifest(folder)
    return {"bytes": text.stat().st_size, "settings": name, "seconds": manifest.data["notes"]["seconds"],
            "tokens": manifest.counts["train_tokens"] + manifest.counts["heldout_tokens"],
            "peak": peak}


def row_of(result: dict[str, Any]) -> list[str]:
    seconds, size, tokens = result["seconds"], result["bytes"] / MB, result["tokens"]
    near = seconds.get("near-duplicates")
    return [f"{size:,.0f} MB", result["settings"], f"{tokens:,}",
            *(f"{size / seconds['reading'][clock]:.1f}" for clock in ("wall", "processor")),
            f"{size / near['processor']:.1f}" if near else "-",
            *(f"{tokens / seconds['tokens'][clock]:,.0f}" for clock in ("wall", "processor")),
            *(f"{sum(each[clock] for each in seconds.values()):,.0f}" for clock in ("wall", "processor")),
            f"{result['peak'] / MIB:,.0f}"]


def main(argv: list[str]) -> None:
    given = arguments(argv)
    rows = []
    for size in given.megabytes:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            text = Path(folder) / "text.txt"
            write_text(text, size * MB)
            for name in given.settings:
                rows.append(row_of(prepared(text, name, given.vocab_size, given.workers)))
                say(" | ".join(rows[-1]))
    say(markdown(HEADER, rows))


if __name__ == "__main__":
    run_program(main)
