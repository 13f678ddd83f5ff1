"""Faults on purpose: kill, signal, fill the disk, damage files, start twice; then the same command finishes with the same figures.

    python -m tests.faults --runs DIR [--stages pretrain ppo] [--faults kill ...] [--kills 20]        (make faults)

Every trial runs a stage of the smoke recipe, in `DIR/trial`, on parents in `DIR/smoke`, and is one JSON line in `--out`; trials that are
there are not run again. Half the kills come at random times, half at file system events, which an audit hook counts in an undisturbed
run: opening, renaming, removing of anything in the run folder. At a chosen one the stage is killed, at once or some milliseconds later,
so inside the write that follows.

It lives in tests because no product may know of it. Stages run in forks of this process, which has imported what they import: that
saves ten seconds a trial and hides nothing from a kill, since nothing is written before.
"""
import argparse
import collections
import errno
import importlib
import json
import math
import os
import random
import re
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stages.run.checkpoint import read_metrics
from stages.run.console import table
from stages.run.manifest import MANIFEST, Manifest, hash_data
from stages.run.preemption import EXIT_CODE, GRACE_S
from stages.run.preemption import MARK as PREEMPTED
from tests.conftest import PARENTS

MANY, FEW = ("pretrain", "ppo"), ("prepare", "scaling", "sft", "preferences", "reward_model", "rejection_sampling", "evaluation")
TRAINING = ("pretrain", "sft", "reward_model", "ppo")
JITTERS_S = (0.0, 0.0, 0.001, 0.004, 0.02)
LIMIT_S = 600.0
LEAVING_S = 2.0  # a stage that has finished may take so long to end, and hears nothing
PRELOADED = (
    "stages.models.pretraining", "stages.models.finetuning", "stages.models.ranking", "stages.rl.trainer", "stages.rl.gating",
    "stages.evals.asking", "stages.evals.battery", "stages.laws.fit", "stages.laws.holdout", "stages.run.figures", "stages.data.overlap",
    "stages.data.tokenizer", "matplotlib.pyplot", "transformers.models.qwen3.modeling_qwen3", "scipy.optimize", "pandas")


class Ended(NamedTuple):
    """How a stage ended: exit codes, negative for a signal, what it printed, processor seconds of the first process (which say where in a
    run one is, however busy the machine), and file system events where they were counted."""

    codes: tuple[int, ...]
    text: str
    seconds: float
    events: list[str]

    @property
    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("error")]


def kind_of(event: str, path: str, run: str) -> str | None:
    """What a file system event belongs to: checkpoint, manifest, swap, product, other; None outside the run."""
    if not path.startswith(run):
        return None
    inside = path[len(run):]
    if event == "os.rename" and inside in (".partial", ""):
        return "swap"
    if ".old" in inside[:5]:
        return "swap"
    if "checkpoint" in inside:
        return "checkpoint"
    if MANIFEST in inside:
        return "manifest"
    if re.search(r"/(model|tokens|tokenizer|problems|adapter|critic|results|asked|chunks|figures|documents|members|round-)", inside) or \
            inside.endswith(("parquet", "fit.json", "points.jsonl", "results.json", "prediction.json")):
        return "product"
    return "other"


def hook(run: str, report: int, at: int | None) -> Callable[[str, tuple], None]:
    """Count file system events of this process below `run`: each as a line into the pipe `report`, or only that with the number `at`."""
    count = 0

    def look(event: str, arguments: tuple) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str) or not (flags & (os.O_WRONLY | os.O_RDWR)):
                return
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            path = arguments[0]
        else:
            return
        kind = kind_of(event, os.path.abspath(os.fspath(path)), run) if isinstance(path, str | os.PathLike) else None  # noqa: PTH100
        if kind:
            if at is None or count == at:
                os.write(report, f"{kind} {event} {path}\n".encode())
                if at is not None:
                    time.sleep(1e-4)  # let the killer read
            count += 1

    return look


class Wrong(Exception):
    """What must not happen: other figures, something finished that is damaged, no clear line."""


class Lab:
    """`runs/smoke` with the finished runs that trials stand on, and `runs/trial`, where they happen."""

    def __init__(self, runs: Path):
        self.runs, self.trial = runs.resolve(), runs.resolve() / "trial"
        self.runs.mkdir(parents=True, exist_ok=True)
        self.references: dict[tuple[str, int], Ended] = {}

    def start(self, stage: str, flags: list[str], *, processes: int = 1, at: int | None = None, count: bool = False,
              prepared: Callable[[], None] = lambda: None) -> "Running":
        """Fork the stage's processes, `prepared` in each; with `count` the first reports its file system events, or only the one with
        the number `at`."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        log = Path(tempfile.mkstemp(dir=self.runs, suffix=".log")[1])
        pids, pipe = [], os.pipe()
        for rank in range(processes):
            pids.append(os.fork())
            if pids[-1]:
                continue
            try:
                os.setpgid(0, 0)
                os.close(pipe[0])
                printed = os.open(log, os.O_WRONLY | os.O_APPEND)
                os.dup2(printed, 1)
                os.dup2(printed, 2)
                os.environ.update({"PLUMBLINE_RUNS": str(self.runs), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"})
                if processes > 1:
                    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                                       "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
                if rank == 0 and (count or at is not None):
                    sys.addaudithook(hook(str(self.trial / stage), pipe[1], at))
                prepared()
                sys.argv = [stage, "--config", f"recipes/smoke/{stage}.yaml", *flags]
                runpy.run_module(f"stages.{stage}", run_name="__main__")
                os._exit(0)
            except SystemExit as end:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code if isinstance(end.code, int) else 1)
            except BaseException as error:  # a child that came back would go on as the harness
                print(f"harness: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
        os.close(pipe[1])
        return Running(pids, pipe[0], log)

    def run(self, stage: str, *more: str, processes: int = 1, count: bool = False) -> Ended:
        return self.start(stage, [*self.flags(stage), *more], processes=processes, count=count).end()

    def flags(self, stage: str) -> list[str]:
        return ["--run-dir", str(self.trial / stage)]

    def base(self, stage: str) -> Path:
        """The finished run of the recipe, which other stages stand on."""
        folder = self.runs / "smoke" / stage
        if not (folder / MANIFEST).is_file():
            for parent in PARENTS[stage]:
                self.base(parent)
            ended = self.start(stage, []).end()
            if any(ended.codes):
                raise SystemExit(f"stages.{stage} does not finish undisturbed:\n{ended.text[-3000:]}")
        return folder

    def reference(self, stage: str, processes: int = 1) -> tuple[Path, Ended]:
        """An undisturbed run in the trial's folder with its events and its time; in one process it has to equal the base."""
        kept = self.runs / f"undisturbed-{processes}" / stage
        if (stage, processes) not in self.references:
            base = self.base(stage)
            self.clear()
            ended = self.run(stage, processes=processes, count=True)
            if any(ended.codes):
                raise SystemExit(f"stages.{stage} does not finish undisturbed in {processes} processes:\n{ended.text[-3000:]}")
            if processes == 1 and (wrong := differs(base, self.trial / stage)):
                raise SystemExit(f"two undisturbed runs of stages.{stage} differ: {wrong}")
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(self.trial / stage, kept)
            self.references[stage, processes] = ended
        return kept, self.references[stage, processes]

    def clear(self) -> None:
        for folder in (self.trial, self.runs / "parents"):
            shutil.rmtree(folder, ignore_errors=True)
        self.trial.mkdir()
        for log in self.runs.glob("*.log"):
            log.unlink()

    def finish(self, stage: str, *more: str, processes: int = 1) -> None:
        """The same command once more has to finish with the undisturbed run's figures. Raises Wrong."""
        whole, _ = self.reference_kept(stage, processes)
        ended = self.run(stage, *more, processes=processes)
        if any(ended.codes):
            raise Wrong(f"the same command ends with {ended.codes}: {ended.text[-600:]}")
        if wrong := differs(whole, self.trial / stage):
            raise Wrong(f"the same command finishes with other figures: {wrong}")
        if left := [path.name for path in self.trial.iterdir() if path.name != stage and not path.name.endswith(".txt")]:
            raise Wrong(f"the same command leaves {left}")

    def reference_kept(self, stage: str, processes: int) -> tuple[Path, Ended]:
        return self.runs / f"undisturbed-{processes}" / stage, self.references[stage, processes]


class Running:
    """Processes of a stage at work."""

    def __init__(self, pids: list[int], pipe: int, log: Path):
        self.pids, self.pipe, self.log, self.codes, self.used = pids, pipe, log, dict[int, int](), 0.0

    def alive(self) -> list[int]:
        """Processes still there. As a launcher does: when one has failed, the others are told to go."""
        for pid in [pid for pid in self.pids if pid not in self.codes]:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
                if pid == self.pids[0]:
                    self.used = usage.ru_utime + usage.ru_stime
        left = [pid for pid in self.pids if pid not in self.codes]
        if left and any(self.codes.values()):
            for pid in left:
                os.kill(pid, signal.SIGTERM)
            time.sleep(0.1)
        return left

    def until(self, seen: Callable[[], bool], seconds: float = LIMIT_S, every: float = 0.002) -> bool:
        """Wait for something to be seen while the stage is at work."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.alive():
            if seen():
                return True
            time.sleep(every)
        return False

    def worked(self, seconds: float) -> bool:
        """Wait until the first process has used so much of a processor; whether it is still there."""
        def used() -> bool:
            fields = Path(f"/proc/{self.pids[0]}/stat").read_text().rsplit(") ", 1)[1].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") >= seconds

        return self.until(used)

    def event(self) -> str | None:
        """The event that was asked for, as soon as it comes; None where the stage ends without."""
        return (os.read(self.pipe, 1 << 12).decode().splitlines() or [None])[0]

    def signal(self, number: int, *pids: int) -> None:
        for pid in pids or self.pids:
            os.kill(pid, number)

    def end(self) -> Ended:
        text, end = b"", time.monotonic() + LIMIT_S
        while self.alive() and time.monotonic() < end:
            if select.select([self.pipe], [], [], 0.02)[0]:  # at its end, too: then until the process itself has
                text += os.read(self.pipe, 1 << 16)
                time.sleep(0.005)
        while piece := os.read(self.pipe, 1 << 16) if not self.alive() else b"":
            text += piece
        if self.alive():
            self.signal(signal.SIGKILL, *self.alive())
            raise Wrong(f"still at work after {LIMIT_S:.0f} s: {self.log.read_text()[-600:]}")
        os.close(self.pipe)
        return Ended(tuple(self.codes[pid] for pid in self.pids), self.log.read_text(errors="replace"), self.used,
                     text.decode().splitlines())


def differs(whole: Path, other: Path) -> str | None:
    """What of metrics, counts and steps is not equal between two finished runs; None if all is, products that are there included."""
    first, second = Manifest(whole), Manifest(other)
    for name in second.data["products"]:
        second.product(name)  # raises ValueError where one is not what its manifest says
    for key in ("metrics", "counts"):
        one, two = ({name: value for name, value in of.data[key].items() if not name.endswith("_s")} for of in (first, second))
        if one != two:
            changed = [name for name in one.keys() | two.keys() if one.get(name) != two.get(name)]
            return f"{key}: {[(name, one.get(name), two.get(name)) for name in changed][:3]}"
    steps = [[row["step"] for row in read_metrics(folder / "metrics.jsonl")] for folder in (whole, other)]
    return None if steps[0] == steps[1] else f"steps of metrics.jsonl: {steps}"


def refused(ended: Ended, *codes: int) -> str:
    """The one line with which it stopped. Raises Wrong when it did not, or said less or more."""
    if not any(ended.codes):
        raise Wrong("it finished, though it could not")
    if len(ended.errors) != 1 or "Traceback" in ended.text:
        raise Wrong(f"{len(ended.errors)} error lines, exit {ended.codes}: {ended.text[-800:]}")
    return ended.errors[0]


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
