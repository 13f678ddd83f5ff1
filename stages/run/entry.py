"""How a stage starts and ends as a process: config, launch check, threads, one clear line on bad input, an orderly exit."""
import ctypes
import errno
import itertools
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from stages.run import preemption
from stages.run.config import StageConfig, help_text, load_config, read_yaml
from stages.run.manifest import forget_unbegun, is_main, say
from stages.run.redaction import redacted

C = TypeVar("C", bound=StageConfig)
OTHERS_WAIT_S = 5.0
ROOT = Path(__file__).resolve().parents[2]


def launch(main: Callable[[C], Any], config_class: type[C], *, distributed: bool = True) -> None:
    """Run `main` on the config of the command line, then exit: 0 when finished, 2 on bad input with one line `error: ...`, 143 after
    SIGTERM, with a mark (stages/run/preemption.py).

    A stage with `distributed=False` works on the main process alone; the others leave at once.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        say(f"{sys.modules[main.__module__].__doc__ or ''}\n{help_text(config_class)}")
        sys.exit(0)
    if not distributed and not is_main():
        sys.exit(0)
    code, config = 2, None
    fix_arithmetic()
    die_with_parent()
    try:
        config = load_config(config_class, arguments)
        preemption.listen(config.run_dir)
        if distributed:
            start_processes()
        main(config)
        code = 0
    except KeyboardInterrupt:
        say("interrupted: the same command continues from the last checkpoint"
            + (" (a traceback beside this line is accelerate's own)" if launched() else ""))
        code = 130
    except preemption.Preempted as stopped:
        preemption.leave(str(stopped) or preemption.KEPT)
        code = preemption.EXIT_CODE
    except Exception as error:
        if preemption.told():  # the peer that was signalled first has left a collective behind
            preemption.leave(preemption.KEPT)
            code = preemption.EXIT_CODE
        elif full := disk_full(error, config):
            fail(full, config)
        elif isinstance(error, ValueError | OSError):
            fail(str(error) or type(error).__name__, config)
            if config is not None and is_main():
                forget_unbegun(Path(config.run_dir))
        else:
            print(redacted(traceback.format_exc()), file=sys.stderr)
            code = 1
    stop_processes()
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)  # gloo threads can abort a finished process on their way out
    sys.exit(code)


def run_program(work: Callable[[list[str]], Any]) -> None:
    """Run what is not a stage on the command line's arguments, then exit: 0, or 2 on bad input with one line `error: ...`."""
    try:
        work(sys.argv[1:])
    except (ValueError, OSError) as error:
        fail(str(error), None)
        sys.exit(2)


def fix_arithmetic() -> None:
    """Have MKL reduce and schedule in one fixed way, so that a resumed run is the run that was not interrupted, to the bit.

    Otherwise MKL promises equal results between runs on one machine only within rounding (oneMKL developer guide, "Conditional
    Numerical Reproducibility"). What the user has set stays.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO")
    os.environ.setdefault("MKL_DYNAMIC", "FALSE")


def die_with_parent() -> None:
    """A killed launcher takes its workers along, which save first: a scheduler may signal the launcher alone, and with one process
    `accelerate launch` passes nothing on. Until they have gone, the run's lock keeps the next attempt away.
    """
    if sys.platform == "linux" and launched():
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def launched() -> bool:
    """Whether `accelerate launch` started this process. Its own process gets a Ctrl-C as well, and no worker can keep it quiet."""
    return bool(os.environ.get("ACCELERATE_MIXED_PRECISION"))


def fail(message: str, config: StageConfig | None) -> None:
    """One line for the user; the traceback of what was not foreseen goes to a file beside the run, for whoever has to look deeper.

    What befalls every process is said once: the others hold back, and the launcher ends them when the main one has left.
    What befalls another process alone is said by that one, with its number.
    """
    where, number = "", os.environ.get("RANK", "0")
    if not is_main():
        time.sleep(OTHERS_WAIT_S)
    if config is not None and not foreseen(sys.exception()):
        file = Path(config.run_dir + (".traceback.txt" if is_main() else f".traceback-{number}.txt"))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(redacted(traceback.format_exc()), encoding="utf-8")
            where = f" (traceback in {file})"
        except OSError:
            pass
    print(f"error{'' if is_main() else f' (process {number})'}: {redacted(' '.join(message.split()))}{where}", file=sys.stderr, flush=True)


def foreseen(error: BaseException | None) -> bool:
    """Whether a `raise` of this project ended in it, and so says what to do: not what a library or an operation raised."""
    frames = traceback.extract_tb(error.__traceback__) if isinstance(error, ValueError) else []
    own = bool(frames) and any(Path(frames[-1].filename).is_relative_to(ROOT / room) for room in ("prompts", "reward", "stages"))
    return own and (frames[-1].line or "").startswith("raise ")


def disk_full(error: BaseException, config: StageConfig | None) -> str | None:
    """The message for a full disk, whichever library ran into it: safetensors and torch do not raise OSError."""
    text = str(error)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "StorageFull" in text
    if not full and config is not None and isinstance(error, RuntimeError):  # torch.save: "enforce fail ... unexpected pos"
        parent = next((p for p in Path(config.run_dir).resolve().parents if p.exists()), Path("/"))
        full = shutil.disk_usage(parent).free < 1 << 20
    if not full:
        return None
    place = config.run_dir if config else "the run folder"
    return f"the disk of {place} is full: free some space or set run_dir elsewhere; the same command then continues"


def promised() -> dict[str, Any]:
    """The launch config that `accelerate launch` was given, found on the parent's command line; empty without one."""
    import psutil

    try:
        line = psutil.Process().parent().cmdline()  # type: ignore[union-attr]
    except (psutil.Error, AttributeError):
        return {}
    flags = dict(itertools.pairwise(line))
    if "--config_file" not in flags:
        return {}
    given = {"num_processes": int(flags["--num_processes"])} if "--num_processes" in flags else {}
    return {"file": flags["--config_file"], **read_yaml(flags["--config_file"]), **given}


def take_one_gpu() -> None:
    """Let a process that is alone see one GPU: over several Trainer divides its batches by DataParallel. Call before CUDA is touched."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def start_processes() -> None:
    """Join the process group and check that it is the one promised.

    Three launches that look right train the wrong thing and exit 0 (a world of one process where two were asked for, two
    unconnected worlds, FSDP that is silently plain data parallelism). Raises ValueError for each.
    """
    import torch
    from accelerate import PartialState
    from transformers.utils.logging import disable_progress_bar

    take_one_gpu()
    disable_progress_bar()  # of loading weights: it cuts through the stages' lines
    cpu = not torch.cuda.is_available()
    launch_config = promised()
    asked = int(launch_config.get("num_processes") or os.environ.get("WORLD_SIZE", "1"))
    state = PartialState(cpu=cpu, **({"backend": "gloo"} if cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else {}))
    if state.num_processes != asked:
        raise ValueError(f"{launch_config.get('file', 'the launch')} asks for {asked} processes but {state.num_processes} joined: "
                         "on CPU use recipes/accelerate/cpu-2.yaml (distributed_type MULTI_GPU with use_cpu)")
    if cpu and launch_config:
        if launch_config.get("mixed_precision") == "bf16" and is_main() and not cpu_has_bf16():
            say("this processor has no instructions for bf16 (avx512_bf16, amx_bf16): recipes/accelerate/cpu.yaml is likely faster")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", str(state.num_processes)))
        torch.set_num_threads(max(1, cores() // local))  # the launcher sets one thread: half the speed


def cpu_has_bf16() -> bool:
    """Whether the processor has instructions for products of bf16, as far as torch can tell."""
    import torch

    has: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def cores() -> int:
    """Processor cores that this process may use, where the system tells; all there are elsewhere."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stop_processes() -> None:
    """Leave the process group. Bounded in time: products are complete by now and a hanging peer must not hold them back."""
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(timeout=20)
