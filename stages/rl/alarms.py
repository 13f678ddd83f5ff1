"""Reward hacking while PPO trains: what is watched beside the reward, when an alarm is raised, and what it does to the run.

All of it is in the rows that the Trainer keeps (`state.log_history`, saved in every checkpoint), so a resumed run raises the same
alarms at the same steps. A row tells of the policy that sampled it, which is the checkpoint *before* the row's own step.
"""
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from reward.alarms import Limits, first_alarms, fit_cloud, raised, repetition
from reward.folders import trusted
from reward.model import ENSEMBLE, load_ensemble, member_folders, pad_right
from stages.models import engines
from stages.models.training import gather, rank, world_size
from stages.rl import samples
from stages.rl.measure import Prompts, answers
from stages.rl.models import remove_dropout
from stages.rl.rewards import Response, build_reward, reads_text, reward_models
from stages.rl.rollouts import Scored
from stages.run.checkpoint import MetricsLog
from stages.run.manifest import is_main, say

Action = Literal["warn", "stop", "rollback"]
Watcher = Callable[[Sequence[Response]], Sequence[float] | Tensor]
QUANTILES = (0.05, 0.5, 0.95)
SMOOTHED = 3  # rows whose mean gold decides which checkpoint is the best
REFERENCE_RESPONSES = 256


class Watch(TrainerCallback):
    """Watches a PPOTrainer, which calls `opinions`, `metrics` and `look`; `action` is what an alarm does.

    `watchers` give one number a response, logged as `watch/<name>`. Every `every` iterations (0: never) the first `shown` prompts are
    answered and recorded. `warn` says so; `stop` ends the training there; `rollback` does too, and `settle` then goes back to the
    best checkpoint. Best and last checkpoint stay on the disk with each.
    """

    trainer: Any = None

    def __init__(self, limits: Limits | None = None, action: Action = "warn", *, watchers: Mapping[str, Watcher] | None = None,
                 shown: Prompts = (), every: int = 0):
        self.limits, self.action, self.watchers = limits or Limits(), action, dict(watchers or {})
        self.shown, self.every = shown, every

    # ---- what the trainer asks ----

    def opinions(self, responses: Sequence[Response]) -> list[dict[str, float]]:
        """What each watcher says about each response of this process."""
        columns = {name: [float(value) for value in watcher(responses)] for name, watcher in self.watchers.items()}
        return [{name: column[i] for name, column in columns.items()} for i in range(len(responses))]

    def metrics(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Figures of an iteration's responses over all processes, for alarms and for people.

        `score/beyond` is the share of scores above the 99 % quantile of the first iteration's, in which the policy is the start.
        Standard errors are those of a mean over the iteration's responses.
        """
        scores = np.array([s.score for s in scored])
        top = float(np.quantile(scores, 0.99))
        start = next(iter(self.rows()), {"score/q99": top})
        found = {f"score/q{round(100 * q):02d}": float(np.quantile(scores, q)) for q in QUANTILES}
        found |= {"score/q99": top, "score/beyond": float((scores > start.get("score/q99", math.inf)).mean()),
                  "response/repetition": float(np.mean([repetition(s.response.ids) for s in scored]))}
        columns = {f"watch/{name}": [s.watched[name] for s in scored] for name in self.watchers}
        found |= {name: float(np.mean(values)) for name, values in columns.items()}
        if judged := [s.gold.score for s in scored if s.gold is not None]:
            columns["objective/gold"] = judged
        return found | {f"{name}_se": float(np.std(values) / math.sqrt(len(values))) for name, values in columns.items()
                        if name in ("objective/gold", "watch/second")}

    def look(self, row: dict[str, float]) -> dict[str, float]:
        """What an iteration's row gets besides: `alarm/<name>` and its value for each alarm raised for the first time."""
        rows = [*self.rows(), row]
        known = {key for old in rows for key in old if key.startswith("alarm/")}
        new = [alarm for alarm in raised(rows, self.limits) if f"alarm/{alarm.name}" not in known]
        for alarm in new:
            say(f"alarm at step {alarm.step}: {alarm.name}: {alarm.sentence}")
        self.choose(rows, alarmed=bool(known or new))
        if new and self.action != "warn":
            say(f"stopping at step {alarm.step}: on_alarm is {self.action}")
            self.trainer.control.should_training_stop = self.trainer.control.should_save = True
        return {f"alarm/{alarm.name}": alarm.value for alarm in new}

    def choose(self, rows: Sequence[Mapping[str, float]], *, alarmed: bool) -> None:
        """Name the best checkpoint, which the Trainer then keeps: by gold score where there is a judge, else the last before any alarm."""
        state = self.trainer.state
        sampled_by = int(rows[-1]["step"]) - self.trainer.settings.steps_per_iteration
        if sampled_by <= 0 or sampled_by % self.trainer.args.save_steps:
            return
        judged = self.limits.gold_falls is not None  # else the gold score is looked at by people alone
        golds = [row["objective/gold"] for row in rows[-SMOOTHED:] if judged and "objective/gold" in row]
        if golds:
            gold = math.fsum(golds) / len(golds)
            if state.best_global_step is None or gold > state.best_metric:
                state.best_global_step, state.best_metric = sampled_by, gold
        elif not alarmed:
            state.best_global_step = sampled_by

    def rows(self) -> list[dict[str, float]]:
        """The iterations' rows so far, from the start of the run however often it was resumed."""
        return [row for row in self.trainer.state.log_history if "objective/score" in row] if self.trainer else []

    # ---- what the Trainer calls ----

    def on_train_begin(self, args, state, control, **kwargs):
        if self.action != "warn" and any(key.startswith("alarm/") for row in self.rows() for key in row):
            control.should_training_stop = True  # it was killed after it had stopped
        elif state.global_step == 0:
            self.show()

    def on_step_end(self, args, state, control, **kwargs):
        iteration, rest = divmod(state.global_step, self.trainer.settings.steps_per_iteration)
        if rest == 0 and self.every and (iteration % self.every == 0 or state.global_step == state.max_steps):
            self.show()

    def show(self) -> None:
        if not (self.every and self.shown):
            return
        t, s = self.trainer, self.trainer.settings
        policy = t.whole_policy()
        if not is_main():
            return
        with engines.rounding(t):
            found = samples.look(policy, t.reference, t.tokenizer, self.shown, reward=t.reward, judge=t.judge, seed=s.seed,
                                 temperature=t.model.temperature, max_new_tokens=s.max_new_tokens, eos_ids=s.eos_ids, pad_id=s.pad_id,
                                 stop_strings=s.stop_strings)
        samples.record(Path(t.args.output_dir).parent, t.state.global_step, found)

    def rewind(self, step: int) -> None:
        """Forget the samples after `step`. The main process's work."""
        MetricsLog(Path(self.trainer.args.output_dir).parent / "samples.jsonl").rewind(step)

    # ---- after the training ----

    def settle(self) -> dict[str, Any]:
        """Go back to the best checkpoint if an alarm asks for it, on every process. Returns what the manifest notes of alarms."""
        t = self.trainer
        alarms = first_alarms(self.rows(), self.limits)
        last, best = t.state.global_step, t.state.best_global_step
        kept = last
        if alarms and self.action == "rollback":
            if best:
                t.load_step(best)
                kept = best
                say(f"rolled back from step {last} to the checkpoint of step {best}")
                start = self.rows()[0].get("objective/gold")
                if t.state.best_metric is not None and start is not None and start > t.state.best_metric:
                    say(f"warning: the start itself had the higher gold score, {start:.3f} against {t.state.best_metric:.3f}: nothing was "
                        "gained; keep the SFT model")
            else:
                say(f"no checkpoint is older than the alarm of step {alarms[0].step}, which keeps that of step {last}: set save_iterations "
                    "lower")
        return {"alarms": [alarm._asdict() for alarm in alarms], "on_alarm": self.action, "kept_step": kept, "last_step": last,
                "best_step": best, "watched_iterations": len(self.rows())}


def build_watchers(spec: Mapping[str, float], limits: Limits, *, model_path: Path | None, second: str | None, reference: PreTrainedModel,
                   tokenizer: PreTrainedTokenizerBase, prompts: Prompts, device: torch.device, vocab_size: int,
                   **sampling: Any) -> dict[str, Watcher]:
    """What can be watched beside the reward `spec`: `second` reward model, an ensemble's `disagreement`, `feature_distance`.

    The last two, as far as they have a limit, are those of the first reward model among the reward's sources that fits and reads the
    policy's token ids. Models are loaded beside the reward's own, for inference alone. The features' reference are responses of
    `reference` to the first prompts, drawn again by each attempt of a run, the same ones by their keys; call on every process. Raises
    ValueError as `build_reward` does.
    """
    found: dict[str, Watcher] = {}
    if second is not None:
        if not (Path(second) / "config.json").is_file():
            raise ValueError(f"second_reward {second!r} has no config.json: give the folder of a reward model, such as "
                             "runs/other/reward_model/model")
        found["second"] = build_reward({second: 1.0}, model_path=None, vocab_size=vocab_size, device=device, tokenizer=tokenizer)
    folders = reward_models({name: weight for name, weight in spec.items() if not reads_text(name)}, model_path)

    def load(folder: Path) -> PreTrainedModel:
        model = AutoModelForSequenceClassification.from_pretrained(trusted(folder), num_labels=1).to(device).eval()
        return remove_dropout(model).requires_grad_(False)

    if limits.disagreement is not None and (ensembles := [folder for folder in folders if (folder / ENSEMBLE).is_file()]):
        ensemble = load_ensemble(ensembles[0], [load(folder) for folder in member_folders(ensembles[0])], None)
        found["disagreement"] = lambda responses: [ensemble.disagreement([of]) for of in
                                                   ensemble.raw([r.prompt_ids + r.ids for r in responses])]
    if limits.feature_distance is not None and folders:
        model, asked = load(folders[0]), prompts[:REFERENCE_RESPONSES]
        mine = asked[rank()::world_size()]
        drawn = answers(reference, tokenizer, mine, 1, **sampling) if mine else []
        cloud = fit_cloud(np.array(gather(last_hidden(model, [r.prompt_ids + r.ids for r in drawn]).tolist())))
        found["feature_distance"] = lambda responses: cloud.distances(
            last_hidden(model, [r.prompt_ids + r.ids for r in responses])).tolist()
    return found


@torch.no_grad()
def last_hidden(model: PreTrainedModel, rows: Sequence[list[int]], batch_size: int = 64) -> np.ndarray:
    """(N, d) float64: a reward model's last hidden state at the last token of each sequence, which its score is a product with."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = np.zeros((len(rows), model.config.get_text_config().hidden_size))
    for start in range(0, len(order), batch_size):
        chosen = order[start:start + batch_size]
        ids, mask = (t.to(model.device) for t in pad_right([rows[i] for i in chosen], 0))
        hidden = model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        found[chosen] = hidden[torch.arange(len(chosen)), mask.sum(dim=1) - 1].double().cpu().numpy()
    return found
