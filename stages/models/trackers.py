"""Curves in trackers that stay right when a run is interrupted and goes on: the same steps, none twice, in one place."""
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback, TrackioCallback, rewrite_logs

from stages.run.manifest import is_main

ONCE = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")  # said at the end, no curve


class SteppedTrackio(TrackioCallback):
    """transformers' own leaves counting to trackio, which goes on counting log lines after a resume as if none were repeated."""

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if not self._initialized:
            self.setup(args, state, model)
        if state.is_world_process_zero:
            curves = {key: value for key, value in (logs or {}).items() if key not in ONCE}
            self._trackio.log(rewrite_logs(curves), step=state.global_step)


def keep_steps(trainer: Any, step: int) -> None:
    """Have the trackers of `trainer` go on from `step`, the one that is about to be continued from (0: the beginning).

    TensorBoard's events lie in `tensorboard/` of the run, all attempts together; what an interrupted one logged after `step` is hidden
    there. trackio takes up the run of the same name, with the trainer's steps.
    """
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    if TensorBoardCallback in kinds:
        trainer.remove_callback(TensorBoardCallback)
        if is_main():
            from torch.utils.tensorboard import SummaryWriter

            folder = Path(trainer.args.output_dir).parent / "tensorboard"
            trainer.add_callback(TensorBoardCallback(SummaryWriter(log_dir=str(folder), purge_step=step + 1)))
    if TrackioCallback in kinds:
        trainer.remove_callback(TrackioCallback)
        trainer.add_callback(SteppedTrackio())
