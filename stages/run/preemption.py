"""SIGTERM or SIGUSR1: save what there is, leave a mark that tells this end from success and from failure, and go, all in bounded time.

`accelerate launch` returns 1 whatever its workers' codes were, so the mark, and not the exit code, is what `make` and schedulers can
trust: `<run_dir>.partial/PREEMPTED`, there from the signal until the run continues. A stage ends where it stands, for what it has on
disk is always whole; a training loop inside `deferred()` ends its step and saves first. (An exception would not do: code that ignores
errors, a destructor say, swallows it.)
"""
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK, EXIT_CODE = "PREEMPTED", 143  # 128 + SIGTERM, as shells count
KEPT = "what was finished is on disk"
GRACE_S = 120.0  # what a step and its checkpoint may take; schedulers have to grant it between SIGTERM and SIGKILL

_state: dict = {"folder": None, "since": None, "deferred": 0, "left": False, "settled": False}


class Preempted(BaseException):
    """Raised where training has saved. No Exception: nothing that goes on after errors may go on after this."""


def listen(run_dir: str) -> None:
    """Take both signals from here on; the mark of an earlier attempt goes, so that what is found afterwards is this one's."""
    _state.update(folder=Path(run_dir + ".partial"), since=None, deferred=0, left=False, settled=False)
    if os.environ.get("RANK", "0") == "0":
        (_state["folder"] / MARK).unlink(missing_ok=True)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # the latter for clusters: torch's launcher takes no notice of it, if told to ignore it
        signal.signal(number, _received)


def _received(signum: int, frame: object) -> None:
    if _state["since"] is not None or _state["settled"]:
        return  # launchers and schedulers send it more than once
    _state.update(since=time.monotonic(), left=_left_behind())
    timer = threading.Timer(GRACE_S, _give_up)
    timer.daemon = True
    timer.start()
    if not _state["deferred"]:
        _end(KEPT)


def _left_behind() -> bool:
    """Whether another process of this machine has ended already: then its failure is why the launcher tells the rest to go."""
    if (count := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) == 1:
        return False
    import psutil

    try:
        me = psutil.Process()
        alike = [p for p in me.parent().children() if p.status() != psutil.STATUS_ZOMBIE and p.cmdline() == me.cmdline()]
    except (psutil.Error, AttributeError):
        return False
    return len(alike) < count


def _end(what: str) -> None:
    if told():
        leave(what)
    os._exit(EXIT_CODE)


def _give_up() -> None:
    """Something hangs, a peer that is gone, say. Earlier checkpoints are whole."""
    _end("nothing new could be saved in time; the last checkpoint is safe")


def signalled() -> bool:
    return _state["since"] is not None


def told() -> bool:
    """Whether the run was told to go: this process, or another one that has left the mark; not where another one has failed."""
    return marked() or (signalled() and not _state["left"])


@contextmanager
def deferred() -> Iterator[None]:
    """Within, a signal only counts, and whoever asks `signalled()` has to raise Preempted; one nobody asked for ends the process after."""
    _state["deferred"] += 1
    try:
        yield
    finally:
        _state["deferred"] -= 1
    if signalled() and not _state["deferred"]:
        _end(KEPT)


def anywhere(here: bool) -> bool:
    """Whether it is so on any process. A collective."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return here
    import torch

    flag = torch.tensor(int(here), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def settle(folder: Path) -> None:
    """The end of the run in `folder`, for which processes wait for one another: whatever ends one up to here ends all, and after it no
    signal ends any. Nothing for a run that is a part of the stage's. A collective. Raises OSError where a process does not come."""
    if folder != _state["folder"]:
        return
    try:
        anywhere(False)
    except RuntimeError as error:
        raise OSError(f"another process ended, or took too long, before this run was finished: {error}") from None
    _state["deferred"] += 1
    if anywhere(signalled()):
        raise Preempted
    _state["settled"] = True


def marked() -> bool:
    """Whether this process or another one of the run has left the mark."""
    return _state["folder"] is not None and (_state["folder"] / MARK).is_file()


def leave(what: str) -> None:
    """Leave the mark, where a run has begun, and say how long it took to be safe."""
    since, folder = _state["since"], _state["folder"]
    took = {"seconds_to_safe": round(time.monotonic() - since, 2)} if since is not None else {}  # else another process was signalled
    first = not marked()
    if folder is not None and folder.is_dir() and (took or first):
        temporary = folder / f".{MARK}.{os.getpid()}"
        temporary.write_text(json.dumps({"saved": what, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **took}) + "\n",
                             encoding="utf-8")
        if not took:  # the process that was signalled knows more, and may have come in between
            with suppress(OSError):
                os.link(temporary, folder / MARK)
            temporary.unlink()
        else:
            temporary.replace(folder / MARK)
    if first or os.environ.get("RANK", "0") == "0":
        after = f", {took['seconds_to_safe']:.1f} s after the signal" if took else ""
        line = f"preempted{after}: {what}; the same command continues ({MARK} in {folder})\n"
        os.write(2, line.encode())  # a handler may have come in the middle of a print
