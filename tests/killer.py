"""Run a stage in this process and kill it, as `kill -9` does, at a named moment: `python tests/killer.py MOMENT stages.x --config ...`.

Moments: `step:N` before optimizer step N; `save:N` inside the N-th checkpoint write, its optimizer file cut in half;
`finish` when everything is trained but no manifest is written; `swap` between the two renames that put the run in place.
"""
import os
import runpy
import signal
import sys
from pathlib import Path

from stages.models import training
from stages.run.manifest import Run


def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str) -> None:
    kind, _, number = moment.partition(":")
    if kind == "step":
        step = training.Resumable.training_step

        def training_step(self, *args, **kwargs):
            if self.state.global_step + 1 == int(number):
                die()
            return step(self, *args, **kwargs)

        training.Resumable.training_step = training_step
    elif kind == "save":
        saves, mark = [], training.mark_complete

        def mark_complete(folder, **kwargs):
            saves.append(folder)
            if len(saves) == int(number):
                file = folder / "optimizer.pt"
                file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
                die()
            mark(folder, **kwargs)

        training.mark_complete = mark_complete
    elif kind == "finish":
        Run.finish = die
    elif kind == "swap":
        rename = Path.rename

        def then_die(self, target):
            rename(self, target)
            if str(target).endswith(".old"):
                die()

        Path.rename = then_die
    else:
        raise ValueError(f"unknown moment {moment}")


if __name__ == "__main__":
    arm(sys.argv[1])
    module = sys.argv[2]
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__")
