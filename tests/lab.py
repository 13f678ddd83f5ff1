"""A laboratory for what may befall a stage: its processes in forks, signalled or killed at a time or an event, and compared afterwards.

For tests/faults.py and tests/engines.py. It lives in tests because no product may know of it. Stages run in forks of this process, which
has imported what they import: that saves ten seconds a trial and hides nothing from a kill, since nothing is written before.
"""
import os
import re
import runpy
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from stages.run.checkpoint import read_metrics
from stages.run.manifest import MANIFEST, Manifest
from tests.conftest import PARENTS

LIMIT_S = 600.0
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
