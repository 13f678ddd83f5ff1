"""Before a policy learns from reward models: is each of them good enough, by what its own run measured?"""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reward.gate import HEADER, Gate, judge
from stages.rl.questions import QuestionConfig
from stages.rl.rewards import reward_models
from stages.run.config import fill
from stages.run.console import table
from stages.run.manifest import MANIFEST, Manifest, say


def pass_gate(config: QuestionConfig, model_path: Path | None) -> dict[str, Any]:
    """Judge the reward models among the sources of `config.reward`, print each verdict, and return them for the manifest's notes.

    A reward without a model (a verifier, a function) has no gate; a folder whose run left no manifest has no figure measured, and
    warns of each. Raises ValueError when a verdict is `fail` and `config.gate` is `refuse`, and for a threshold that does not exist.
    """
    gate = Gate(**fill(Gate, config.gate_limits, where="gate_limits"))
    if config.gate == "off":
        return {}
    verdicts: dict[str, Any] = {}
    for folder in dict.fromkeys(reward_models(config.reward, model_path)):
        metrics: Mapping[str, Any] = Manifest(folder.parent).metrics if (folder.parent / MANIFEST).is_file() else {}
        verdict = judge(metrics, gate)
        say(f"{config.STAGE}: is the reward model {folder} good enough to learn from? verdict: {verdict.level}\n"
            + table(HEADER, verdict.rows()))
        if verdict.level == "fail" and config.gate == "refuse":
            raise ValueError(f"the reward model {folder} is not good enough: {verdict.why('fail')}; train a better one "
                             "(docs/reward-model.md), set gate_limits to what the task needs, or gate: warn to go on all the same")
        verdicts[str(folder)] = {"gate": config.gate, "limits": vars(gate), **verdict.as_note()}
    return {"reward_model_gate": verdicts} if verdicts else {}
