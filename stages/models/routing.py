"""Routers of mixtures of experts: their losses over the batch of an optimizer step, a bias that balances without a loss, their health.

transformers has a balancing loss, off by default (`output_router_logits`), that puts the tokens of all layers together before it
multiplies: layers that each collapse on experts of their own look balanced to it. Here each layer has its own loss, over all tokens of
an optimizer step: all micro-batches and all processes, padding left out.

Letters: L layers with a router, N tokens, E experts, k experts that a token visits.
"""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from stages.models.training import world_size

DEAD = 0.01  # an expert that takes less than this of its even share is dead
BIAS = "e_score_correction_bias"  # what transformers calls the bias on the choice, where a router has one


class Routing(NamedTuple):
    """What one router did: `logits` (N, E) and `chosen` (N, k), the experts that each token visits."""

    logits: Tensor
    chosen: Tensor


class Sums(NamedTuple):
    """Sums over tokens, float32. `counts` (L, E): tokens that visit each expert; `probabilities` (L, E): of the router, summing to 1 a
    token; `squares` (L,): of the log of the logits' exponentials' sum; `entropy` (L,): of the probabilities, nats. `counts` and
    `entropy` have no gradient."""

    counts: Tensor
    probabilities: Tensor
    squares: Tensor
    entropy: Tensor


def sums(routings: Sequence[Routing], real: Tensor, *, sigmoid: bool = False) -> Sums:
    """Sums over the tokens where `real` (N,) is True. `sigmoid`: probabilities are sigmoids over their sum (DeepSeek-V3, section 2.1.2)."""
    parts = []
    for logits, chosen in routings:
        logits = logits[real].float()
        counts = torch.bincount(chosen[real].flatten(), minlength=logits.size(1)).float()
        scale = logits.logsumexp(-1)
        if sigmoid:
            scores = logits.sigmoid()
            probabilities = scores / scores.sum(-1, keepdim=True)
        else:
            probabilities = (logits - scale[:, None]).exp()
        with torch.no_grad():
            entropy = torch.special.entr(probabilities).sum()
        parts.append((counts, probabilities.sum(0), scale.square().sum(), entropy))
    return Sums(*(torch.stack(column) for column in zip(*parts, strict=True)))


def balance_loss(shares: Tensor, probabilities: Tensor) -> Tensor:
    """(L,): E sum_e f_e P_e of each layer, Switch's load-balancing loss (Fedus et al. 2021, equation 4) for any k.

    `shares` (L, E): f_e, the share of tokens that visit e, without gradient; a row sums to k. `probabilities` (L, E): P_e, the router's
    mean probability. It is k where routing is uniform and up to E where k experts take everything. P_e is linear in the tokens, so with f
    and the number of tokens of the whole batch the losses of its parts add up to its own, and so do their gradients.
    """
    return shares.size(-1) * (shares * probabilities).sum(-1)


def updated_bias(bias: Tensor, shares: Tensor, rate: float) -> Tensor:
    """(L, E): the bias on the choice after a batch, up by `rate` for experts below the even share and down for those above.

    Wang et al. 2024 (arXiv 2408.15664, algorithm 1): it changes which experts are chosen, not their weights, and has no gradient.
    """
    return bias + rate * (shares.mean(-1, keepdim=True) - shares).sign()


def max_violation(shares: Tensor) -> Tensor:
    """(L,): by how much of the even share the fullest expert exceeds it, MaxVio (Wang et al. 2024, section 3): 0 is balanced."""
    return shares.amax(-1) / shares.mean(-1) - 1


def dead(shares: Tensor) -> Tensor:
    """(L,): experts that take less than `DEAD` of their even share."""
    return (shares < DEAD * shares.mean(-1, keepdim=True)).sum(-1)


def churn(before: Tensor, after: Tensor) -> Tensor:
    """(L,): mean share of a token's k experts that it did not visit before. `before`, `after` (N, L, k), of the same tokens."""
    kept = (before[..., :, None] == after[..., None, :]).any(-2)
    return 1 - kept.float().mean((0, 2))


def reduced(tensor: Tensor) -> Tensor:
    """Sum over processes, on every process."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


class Routers:
    """The routers of a decoder: what they did in a forward pass, their losses in an optimizer step, and their health since the last log."""

    def __init__(self, model: PreTrainedModel, *, balance_coef: float = 0.0, z_coef: float = 0.0, bias_rate: float = 0.0):
        self.modules = [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]
        assert self.modules, f"{model.config.model_type} has no routers"
        self.balance_coef, self.z_coef, self.bias_rate = balance_coef, z_coef, bias_rate
        self.sigmoid = hasattr(self.modules[0], BIAS)
        if bias_rate and not self.sigmoid:
            raise ValueError(f"balance_bias_rate {bias_rate}: routers of {model.config.model_type} have no bias, and transformers would "
                             "load the model without it: set it to 0, or architecture to dots1")
        self.pad_id = model.config.pad_token_id
        self.top_k, self.num_experts = int(model.config.num_experts_per_tok), int(self.modules[0].num_experts)  # type: ignore[arg-type]
        self._seen: list[Routing] | None = None
        for module in self.modules:
            module.register_forward_hook(self._record)
        self.shares: Tensor | None = None
        self.tokens = torch.ones(())
        self._load: Any = 0
        self._violation: Any = 0
        self._losses: Any = 0
        self._steps = 0

    def _record(self, module: nn.Module, _: Any, out: tuple[Tensor, Tensor, Tensor]) -> None:
        if self._seen is not None:  # not when activations are computed again in the backward pass
            self._seen.append(Routing(out[0].view(-1, out[0].size(-1)), out[2].view(-1, out[2].size(-1))))

    @contextmanager
    def recording(self) -> Iterator[list[Routing]]:
        """A list that holds the routing of each layer, in order, after one forward pass inside."""
        seen: list[Routing] = []
        self._seen = seen
        try:
            yield seen
        finally:
            self._seen = None

    def real(self, input_ids: Tensor) -> Tensor:
        """(N,): where `input_ids` is more than padding."""
        return (input_ids != self.pad_id).flatten()

    @torch.no_grad()
    def begin_step(self, model: nn.Module, batches: Sequence[dict[str, Tensor]], device: torch.device) -> None:
        """Tell the batches of an optimizer step. Called on every process.

        f_e is only known when all of them have gone forward, so where there are several, they go forward once more than a dense
        model's, without gradient or head. With one, f_e comes out of the pass that has the gradient.
        """
        inputs = [{name: batch[name].to(device) for name in ("input_ids", "position_ids")} for batch in batches]
        self.tokens = reduced(sum((self.real(one["input_ids"]).sum() for one in inputs), torch.zeros((), device=device)))
        self.shares = None
        if len(batches) > 1:
            counts: Any = 0
            for one in inputs:
                with self.recording() as seen:
                    model(**one, use_cache=False, logits_to_keep=1)
                counts = counts + sums(seen, self.real(one["input_ids"]), sigmoid=self.sigmoid).counts
            self._found(counts)

    def _found(self, counts: Any) -> None:
        self.shares = reduced(counts) / self.tokens
        self._load = self._load + self.shares
        self._violation = self._violation + max_violation(self.shares)
        self._steps += 1

    def loss(self, seen: Sequence[Routing], input_ids: Tensor) -> Tensor:
        """What these tokens add to the loss of the step: mean over layers of the balancing loss and the z-loss, with their coefficients.

        The z-loss is the mean square of the log of the summed exponentials (Zoph et al. 2022, equation 5). Call on every process.
        """
        found = sums(seen, self.real(input_ids), sigmoid=self.sigmoid)
        if self.shares is None:
            self._found(found.counts)
        assert self.shares is not None
        balance, z = balance_loss(self.shares, found.probabilities / self.tokens), found.squares / self.tokens
        self._losses = self._losses + torch.stack([balance, z, found.entropy / self.tokens]).detach()
        return self.balance_coef * balance.mean() + self.z_coef * z.mean()

    @torch.no_grad()
    def end_step(self) -> None:
        """Move the biases, where they balance."""
        if self.bias_rate:
            assert self.shares is not None
            for module, shares in zip(self.modules, self.shares, strict=True):
                bias = module.get_buffer(BIAS)
                bias.copy_(updated_bias(bias, shares, self.bias_rate))

    def health(self) -> tuple[dict[str, float], dict[str, list]]:
        """Since the last call, means over its steps: figures to log, means over layers (of `dead` the sum), and the same for each layer
        with the load of each expert, 1 being even.

        Call on every process. MaxVio is that of single steps; an expert is dead when it was so over all of them.
        """
        if not self._steps:
            return {}, {}
        balance, z, entropy = reduced(self._losses) / self._steps
        layers = {"balance_loss": balance, "z_loss": z, "entropy": entropy, "max_vio": self._violation / self._steps,
                  "dead": dead(self._load).float()}
        load = self._load / self._load.mean(-1, keepdim=True)
        self._load = self._violation = self._losses = self._steps = 0
        return ({f"router/{name}": (column.sum() if name == "dead" else column.mean()).item() for name, column in layers.items()},
                {name: column.tolist() for name, column in layers.items()} | {"load": load.tolist()})

    @torch.no_grad()
    def chosen(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor]:
        """(B, T L k): the experts that each token of B rows visits, a row of `heldout.measured`."""
        with self.recording() as seen:
            model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, logits_to_keep=1)
        return (torch.stack([one.chosen for one in seen], 1).view(len(batch["input_ids"]), -1),)

    @torch.no_grad()
    def visits(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor]:
        """(B, L E): how many tokens of each row visit each expert, padding left out."""
        chosen = self.chosen(model, batch)[0].view(*batch["input_ids"].shape, len(self.modules), -1)
        held = nn.functional.one_hot(chosen, self.num_experts).sum(3)  # (B, T, L, E)
        return ((held * (batch["input_ids"] != self.pad_id)[..., None, None]).sum(1).flatten(1),)


class BiasUpdate(TrainerCallback):
    """Moves the routers' biases after each optimizer step, before anything is saved."""

    def __init__(self, routers: Routers):
        self.routers = routers

    def on_step_end(self, args, state, control, **_):
        self.routers.end_step()
