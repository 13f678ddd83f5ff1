"""Training on K ranked responses a prompt: a small subclass of TRL's RewardTrainer and its batches.

Letters: B prompts, K responses a prompt (at most), R responses of the batch, P and T tokens of prompts and responses.
"""
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import RewardTrainer

from reward.calibration import accuracy, judged
from reward.losses import centring_penalty, preferred, ranked_loss
from reward.model import Group, pad_right, score_groups
from stages.models.optimizer import build_optimizer
from stages.models.training import Resumable, gather, rank, world_size


class RankedCollator:
    """Prompts with all their responses to one batch, in which each response stands once, however many pairs it is in.

    Gives `ranks` (B, K), 0 for padding; `slots` (B, K), the row of each response; and either `input_ids` and
    `attention_mask` (R, P + T) or, with `share_prompts`, `prompt_ids`, `prompt_mask` (B, P), padded left, `owner` (R,), the
    prompt of each response, and `input_ids`, `attention_mask` (R, T) of the responses alone.
    """

    def __init__(self, pad_id: int, share_prompts: bool):
        self.pad_id, self.share_prompts = pad_id, share_prompts

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ranks, real = pad_right([row["ranks"] for row in rows], 0)
        slots = torch.zeros_like(ranks)
        slots[real] = torch.arange(int(real.sum()))
        if not self.share_prompts:
            ids, mask = pad_right([row["prompt_ids"] + response for row in rows for response in row["response_ids"]], self.pad_id)
            return {"ranks": ranks, "slots": slots, "input_ids": ids, "attention_mask": mask.long()}
        ids, mask = pad_right([response for row in rows for response in row["response_ids"]], self.pad_id)
        prompts, prompt_mask = pad_right([row["prompt_ids"][::-1] for row in rows], self.pad_id)
        owner = torch.arange(len(rows)).repeat_interleave(real.sum(1))
        return {"ranks": ranks, "slots": slots, "input_ids": ids, "attention_mask": mask.long(), "owner": owner,
                "prompt_ids": prompts.flip(1), "prompt_mask": prompt_mask.flip(1).long()}


def batch_scores(model: torch.nn.Module, trunk: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(B, K) float32 scores of a batch of `RankedCollator`, padding included.

    With shared prompts the trunk reads each prompt once and its responses continue from that cache: the same scores and
    gradients at about two thirds of the time. The second forward pass goes through `model`, so that a wrapper sees it.
    """
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if "owner" in batch:
        owner, mask = batch["owner"], batch["prompt_mask"]
        cache = trunk(input_ids=batch["prompt_ids"], attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0),
                      use_cache=True).past_key_values
        cache.batch_select_indices(owner)
        positions = mask.sum(1)[owner][:, None] + torch.arange(inputs["input_ids"].size(1), device=owner.device)
        inputs |= {"attention_mask": torch.cat([mask[owner], batch["attention_mask"]], dim=1), "position_ids": positions,
                   "past_key_values": cache}
    return model(**inputs, use_cache="owner" in batch).logits[:, 0].float()[batch["slots"]]


class RankedRewardTrainer(Resumable, RewardTrainer):
    """TRL's RewardTrainer with the loss over all pairs of K ranked responses in place of that of one pair.

    `muon` holds the learning rates of stages.models.optimizer.build_optimizer, None means the optimizer of the arguments.
    """

    def __init__(self, *, heldout: Sequence[dict[str, Any]], muon: dict[str, float] | None, **kwargs):
        self.heldout, self.muon = heldout, muon
        kwargs["eval_dataset"] = kwargs["train_dataset"]  # asked for but never read: `evaluate` measures `heldout`
        super().__init__(**kwargs)

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset  # token ids already, and as they were sampled

    def create_optimizer(self, model=None):
        if self.muon is None:
            return super().create_optimizer(model) if model is not None else super().create_optimizer()
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.model, **self.muon)
            head = self.model.score.weight  # one row: orthogonalised, it would move by the full rate at every step
            matrices, _, rest = self.optimizer.param_groups
            matrices["params"] = [p for p in matrices["params"] if p is not head]
            rest["params"] = [*(p for p in rest["params"] if p is not head), head]
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ranks = inputs["ranks"]
        scores = batch_scores(model, self.accelerator.unwrap_model(model).base_model, inputs)
        loss = ranked_loss(scores, ranks)
        if self.args.center_rewards_coefficient:
            loss = loss + self.args.center_rewards_coefficient * centring_penalty(scores, ranks)
        with torch.no_grad():
            pairs = preferred(ranks)
            order = torch.sign(scores[:, :, None] - scores[:, None, :])
            counts = torch.stack([((1 + order) / 2)[pairs].sum(), pairs.sum()])  # equal scores are half right, as in `judged`
            right, total = self.accelerator.gather(counts[None]).sum(0).tolist()
            self._metrics["train"]["accuracy"].append(right / max(1, total))
        return (loss, {"scores": scores}) if return_outputs else loss

    def evaluate(self, *args, **kwargs):
        """Loss and accuracy on the held-out prompts, each of which counts once whatever the number of processes."""
        model = self.accelerator.unwrap_model(self.model)
        scores = shared_out(model, [(r["prompt_ids"], r["response_ids"]) for r in self.heldout])
        ranks = [r["ranks"] for r in self.heldout]
        loss = ranked_loss(pad_scores(scores), pad_right(ranks, 0)[0]).item()
        logs = {"heldout/loss": loss, "heldout/accuracy": accuracy(judged(scores, ranks)).value}
        model.eval()  # by this RewardTrainer.log tells training from evaluation
        self.log(logs)
        model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs


def pad_scores(scores: Sequence[Sequence[float]]) -> Tensor:
    """(B, K) float32 of ragged scores, zeros to the right."""
    width = max(map(len, scores))
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in scores])


def shared_out(model: PreTrainedModel, groups: Sequence[Group],
               function: Callable[..., list[list[float]]] = score_groups) -> list[list[float]]:
    """`function(model, groups)` with every process doing its share; all of the result on every process."""
    mine = range(rank(), len(groups), world_size())
    together = dict(gather(list(zip(mine, function(model, [groups[i] for i in mine]), strict=True))))
    return [together[i] for i in range(len(groups))]
