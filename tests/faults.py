"""Faults on purpose: kill, signal, fill the disk, damage files, start twice; then the same command finishes with the same figures.

    python -m tests.faults --runs DIR [--stages pretrain ppo] [--faults kill ...] [--kills 20]        (make faults)

Every trial runs a stage of the smoke recipe, in `DIR/trial`, on parents in `DIR/smoke`, and is one JSON line in `--out`; trials that are
there are not run again. Half the kills come at random times, half at file system events, which an audit hook counts in an undisturbed
run: opening, renaming, removing of anything in the run folder. At a chosen one the stage is killed, at once or some milliseconds later,
so inside the write that follows.
"""
import argparse
import collections
import errno
import importlib
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stages.run.console import table
from stages.run.manifest import MANIFEST, Manifest, hash_data
from stages.run.preemption import EXIT_CODE, GRACE_S
from stages.run.preemption import MARK as PREEMPTED
from tests.conftest import PARENTS
from tests.lab import PRELOADED, Lab, Wrong, differs, refused

MANY, FEW = ("pretrain", "ppo"), ("prepare", "scaling", "sft", "preferences", "reward_model", "rejection_sampling", "evaluation")
TRAINING = ("pretrain", "sft", "reward_model", "ppo")
JITTERS_S = (0.0, 0.0, 0.001, 0.004, 0.02)
LEAVING_S = 2.0  # a stage that has finished may take so long to end, and hears nothing


# ---- faults: each gets the laboratory, a stage, random numbers and the trial's number, and returns what it did ----


def kill(lab: Lab, stage: str, rng: random.Random, number: int) -> dict[str, Any]:
    """kill -9, in every other trial while a finished earlier run stands in the place of the new one; sooner where it came too late."""
    whole, undisturbed = lab.reference(stage)
    kinds = sorted({line.split()[0] for line in undisturbed.events})
    of_kind = [i for i, line in enumerate(undisturbed.events) if line.split()[0] == kinds[number // 2 % len(kinds)]]
    for sooner in (1.0, 0.5, 0.25, 0.0):
        lab.clear()
        earlier = plant_earlier(lab, stage, whole) if number % 4 < 2 else None
        if number % 2:
            running, delay = lab.start(stage, lab.flags(stage), at=rng.choice(of_kind)), sooner * rng.choice(JITTERS_S)
            at = f"{running.event()}, {1000 * delay:g} ms later"
            time.sleep(delay)
        else:
            running, delay = lab.start(stage, lab.flags(stage)), sooner * rng.uniform(0.05, 0.97) * undisturbed.seconds
            running.worked(delay)
            at = f"{delay:.2f} s of {undisturbed.seconds:.2f}"
        if running.alive():
            running.signal(signal.SIGKILL)
        if killed := running.end().codes[0] == -signal.SIGKILL:
            break
    if earlier and (lab.trial / stage).exists():
        kept = Manifest(lab.trial / stage)
        if kept.fingerprint == earlier:
            for name in kept.data["products"]:
                kept.product(name)
    lab.finish(stage)
    return {"at": at, "earlier": earlier is not None, "result": "equal" if killed else "too late"}


def plant_earlier(lab: Lab, stage: str, whole: Path) -> str:
    """A finished run of other settings in the trial's place; its fingerprint."""
    shutil.copytree(whole, lab.trial / stage)
    file = lab.trial / stage / MANIFEST
    data = json.loads(file.read_text()) | {"fingerprint": "sha256:earlier"}
    data.pop("checksum")
    file.write_text(json.dumps(data | {"checksum": hash_data(data)}))
    return data["fingerprint"]


def terminate(lab: Lab, stage: str, rng: random.Random, number: int, processes: int = 1) -> dict[str, Any]:
    """SIGTERM at a random time of the run, to one of its processes."""
    _, undisturbed = lab.reference(stage, processes)
    lab.clear()
    partial, delay = lab.trial / f"{stage}.partial", rng.uniform(0.05, 0.9) * undisturbed.seconds
    running = lab.start(stage, lab.flags(stage), processes=processes)
    running.until(partial.is_dir)
    running.worked(delay)
    pid, told = rng.choice(running.pids), math.inf
    if pid in running.alive():
        running.signal(signal.SIGTERM, pid)
        told = time.monotonic()
    ended = running.end()
    found: dict[str, Any] = {"at": f"{delay:.2f} s of {undisturbed.seconds:.2f}", "rank": running.pids.index(pid)}
    if not any(ended.codes):
        if time.monotonic() - told > LEAVING_S:
            raise Wrong(f"{found}: the signal was lost, and the stage went on")
        lab.finish(stage, processes=processes)
        return found | {"result": "too late"}
    if set(ended.codes) != {EXIT_CODE} or not (partial / PREEMPTED).is_file():
        raise Wrong(f"exit {ended.codes}, mark {(partial / PREEMPTED).is_file()}: {ended.text[-800:]}")
    found |= {key: value for key, value in json.loads((partial / PREEMPTED).read_text()).items() if key != "at"}
    if not found.get("seconds_to_safe", GRACE_S + 1) <= GRACE_S:
        raise Wrong(f"safe after {found.get('seconds_to_safe')} s")
    lab.finish(stage, processes=processes)
    if (lab.trial / stage / PREEMPTED).exists():
        raise Wrong("the mark outlives the continued run")
    return found | {"result": "equal"}


def terminate_one_of_two(lab: Lab, stage: str, rng: random.Random, number: int) -> dict[str, Any]:
    return terminate(lab, stage, rng, number, processes=2)


def small_disk(lab: Lab) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(lab.trial)], capture_output=True).returncode:
        raise Skipped("mounting a small file system needs root")


class Skipped(Exception):
    pass


def full_disk(lab: Lab, stage: str, rng: random.Random, number: int) -> dict[str, Any]:
    """The disk fills up while the stage is at work, and is freed afterwards."""
    whole, _ = lab.reference(stage)
    lab.clear()
    small_disk(lab)
    try:
        size = sum(file.stat().st_size for file in whole.rglob("*") if file.is_file())
        share = rng.uniform(0.02, 0.9)
        running = lab.start(stage, lab.flags(stage))
        ballast = lab.trial / "ballast.txt"
        if running.until(lambda: shutil.disk_usage(lab.trial).used > share * size):
            with ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(1 << 12))
                except OSError as error:
                    assert error.errno == errno.ENOSPC
        ended = running.end()
        line = refused(ended) if any(ended.codes) else "too late"
        ballast.unlink(missing_ok=True)
        lab.finish(stage)
        return {"at": f"{share:.2f} of what the run leaves", "said": line, "result": "refused" if any(ended.codes) else "too late"}
    finally:
        subprocess.run(["umount", "-l", str(lab.trial)], check=True)


def read_only(lab: Lab, stage: str, rng: random.Random, number: int) -> dict[str, Any]:
    lab.reference(stage)
    lab.clear()
    small_disk(lab)
    try:
        subprocess.run(["mount", "-o", "remount,ro", str(lab.trial)], check=True)
        line = refused(lab.run(stage))
        subprocess.run(["mount", "-o", "remount,rw", str(lab.trial)], check=True)
        lab.finish(stage)
        return {"said": line, "result": "refused"}
    finally:
        subprocess.run(["umount", "-l", str(lab.trial)], check=True)


def harm(file: Path, rng: random.Random) -> str:
    """Cut a file, or turn one bit of it."""
    data = bytearray(file.read_bytes())
    if rng.random() < 0.5:
        at = rng.randrange(len(data))
        file.write_bytes(data[:at])
        return f"{file.name} cut at {at} of {len(data)}"
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    data[at] ^= 1 << bit
    file.write_bytes(data)
    return f"bit {bit} of byte {at} of {file.name}"


def damaged_parent(lab: Lab, stage: str, rng: random.Random, number: int) -> dict[str, Any]:
    """A product or the manifest of a parent is not what it was; afterwards it is restored."""
    lab.reference(stage)
    if not PARENTS[stage]:
        raise Skipped("it has no parent")
    base = json.loads((lab.base(stage) / MANIFEST).read_text())["parents"]
    name = rng.choice(sorted(base))
    parent = lab.runs / "parents" / name
    shutil.copytree(lab.base(name), parent)
    products = [parent / product["path"] for product in Manifest(parent).data["products"].values()]
    files = [f for p in products for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file() and f.stat().st_size]
    file = parent / MANIFEST if number % 2 else rng.choice(sorted(files))
    before = file.read_bytes()
    done = harm(file, rng)
    more = (f"--parents.{name}", str(parent))
    ended = lab.run(stage, *more)
    found = {"at": f"{name}: {done}"}
    if any(ended.codes):
        found |= {"said": refused(ended), "result": "refused"}
    else:
        found["result"] = "equal"  # as `finish` will find: it does not read this
    file.write_bytes(before)
    lab.finish(stage, *more)
    return found


def damaged_checkpoint(lab: Lab, stage: str, rng: random.Random, number: int) -> dict[str, Any]:
    """A run is killed after its first checkpoint, and a file of one, or the state of the run, is damaged."""
    lab.reference(stage)
    if stage not in TRAINING:
        raise Skipped("it has no checkpoints")
    partial = lab.trial / f"{stage}.partial"
    running = lab.start(stage, lab.flags(stage))
    least = 1 + number % 2
    if not running.until(lambda: len(list(partial.glob("checkpoints/*/complete.json"))) >= least):
        return {"result": "too late"}
    running.signal(signal.SIGKILL)
    running.end()
    files = [f for f in partial.glob("checkpoints/*/**/*") if f.is_file() and f.stat().st_size] + [partial / "run.json"]
    done = harm(rng.choice(sorted(files)), rng)
    ended = lab.run(stage)
    if any(ended.codes):
        found = {"said": refused(ended), "result": "refused"}
        shutil.rmtree(partial)  # what the line says
        lab.finish(stage)
    else:
        found = {"result": "equal"}
        if wrong := differs(lab.reference_kept(stage, 1)[0], lab.trial / stage):
            raise Wrong(f"{done}: finishes with other figures: {wrong}")
    return {"at": done} | found


def damaged_manifest(lab: Lab, stage: str, rng: random.Random, number: int) -> dict[str, Any]:
    """The manifest of the finished run itself."""
    whole, _ = lab.reference(stage)
    shutil.copytree(whole, lab.trial / stage)
    done = harm(lab.trial / stage / MANIFEST, rng)
    line = refused(lab.run(stage))
    shutil.rmtree(lab.trial / stage)  # what the line says
    lab.finish(stage)
    return {"at": done, "said": line, "result": "refused"}


def twice(lab: Lab, stage: str, rng: random.Random, number: int) -> dict[str, Any]:
    """The same command while it is at work: the second refuses, the first finishes."""
    whole, undisturbed = lab.reference(stage)
    running = lab.start(stage, lab.flags(stage))
    running.until((lab.trial / f"{stage}.partial").is_dir)
    running.worked(rng.uniform(0, 0.6) * undisturbed.seconds)
    line = refused(lab.run(stage))
    ended = running.end()
    if any(ended.codes) or (wrong := differs(whole, lab.trial / stage)):
        raise Wrong(f"the first run was disturbed: {ended.codes} {wrong} {ended.text[-600:]}")
    if "another run works on" not in line:
        raise Wrong(line)
    return {"said": line, "result": "refused"}


Fault = Callable[[Lab, str, random.Random, int], dict[str, Any]]
FAULTS: dict[str, Fault] = {"kill": kill, "terminate": terminate, "terminate one of two": terminate_one_of_two, "full disk": full_disk,
                            "read-only": read_only, "damaged parent": damaged_parent, "damaged checkpoint": damaged_checkpoint,
                            "damaged manifest": damaged_manifest, "twice": twice}


def planned(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Stages, faults and numbers of the trials."""
    for fault in args.faults:
        for stage in args.stages:
            if fault == "terminate one of two" and stage not in TRAINING:
                continue
            count = (args.kills if stage in MANY else args.few_kills) if fault == "kill" else args.others
            yield from ((stage, fault, number) for number in range(min(1, count) if fault == "read-only" else count))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder to work in")
    parser.add_argument("--out", type=Path, help="one JSON line a trial (default: faults.jsonl in --runs)")
    parser.add_argument("--stages", nargs="+", default=[*MANY, *FEW], choices=[*MANY, *FEW])
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--kills", type=int, default=20, help=f"kill trials of {' and '.join(MANY)}")
    parser.add_argument("--few-kills", type=int, default=5, help="kill trials of each other stage")
    parser.add_argument("--others", type=int, default=2, help="trials of each other fault and stage")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lab, out = Lab(args.runs), args.out or args.runs / "faults.jsonl"
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    known = {(line["stage"], line["fault"], line["number"]): line for line in lines}
    for module in PRELOADED:
        importlib.import_module(module)
    for stage, fault, number in planned(args):
        if (stage, fault, number) in known:
            continue
        began = time.monotonic()
        line: dict[str, Any] = {"stage": stage, "fault": fault, "number": number}
        try:
            lab.reference(stage)
            lab.clear()
            line |= FAULTS[fault](lab, stage, random.Random(f"{args.seed}:{stage}:{fault}:{number}"), number)
        except Skipped as reason:
            line |= {"result": "skipped", "said": str(reason)}
        except (Wrong, ValueError, OSError) as error:
            line |= {"result": "WRONG", "said": f"{type(error).__name__}: {error}"}
        line["wall_s"] = round(time.monotonic() - began, 1)
        known[stage, fault, number] = line
        print(json.dumps(line), flush=True)
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
    lines = list(known.values())
    results = ("equal", "refused", "too late", "skipped", "WRONG")
    counts = collections.Counter((line["fault"], line["stage"], line["result"]) for line in lines)
    print(table(["fault", "stage", "trials", *results], [
        [fault, stage, str(sum(counts[fault, stage, r] for r in results)), *(str(counts[fault, stage, r] or "") for r in results)]
        for fault in FAULTS for stage in [*MANY, *FEW] if any(counts[fault, stage, r] for r in results)]))
    return int(any(line["result"] == "WRONG" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
