"""Muon for the matrices of the trunk, AdamW for the rest, as one optimizer that Trainer, Accelerate and a scheduler accept.

Muon orthogonalises the momentum of each matrix by a quintic Newton-Schulz iteration (Jordan et al. 2024,
kellerjordan.github.io/posts/muon). Matrices of one shape are stacked and orthogonalised in batched products: at the
tiny sizes the cost is in the number of calls, not in the arithmetic. Where it is the arithmetic, products are of bf16, in which the method
was published, if the device is faster at them: of experts, which all take part while a step's own goes with those visited, and of all
matrices where the training is in bf16.
"""
import functools
import math
from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from transformers import PreTrainedModel

from stages.run.entry import cpu_has_bf16

TOGETHER = 1 << 17  # numbers that are orthogonalised at once: with what comes of them they stay in a core's cache
PAIRED = "experts.gate_up_proj"  # (E, 2 f, h) in transformers: gate above up


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter of a decoder is a matrix or, as experts are kept, a stack of them."""
    return parameter.ndim == 2 or (parameter.ndim == 3 and ".experts." in name)


@functools.cache
def of_products(device_type: str) -> torch.dtype:
    """The type in which products are quick: bf16 where the device has instructions for its products, else float32."""
    return torch.bfloat16 if device_type != "cpu" or cpu_has_bf16() else torch.float32


def orthogonalize(update: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Nearest semi-orthogonal matrix, approximately: singular values land in about [0.7, 1.2].

    `update` (..., rows, columns), float; same shape and dtype out, computed in `dtype` (default: its own).
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan et al. 2024: steepest slope at zero that still converges
    transposed = update.size(-2) > update.size(-1)
    matrices = update.mT if transposed else update
    found = []
    for x in matrices.reshape(-1, *matrices.shape[-2:]).split(max(1, TOGETHER // math.prod(matrices.shape[-2:]))):
        x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype or x.dtype)
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        found.append(x)
    x = torch.cat(found).view(matrices.shape).to(update.dtype)
    return x.mT if transposed else x


class MuonAdamW(torch.optim.Optimizer):
    """Groups with `muon=True` take Muon steps, the others AdamW steps; state and schedules work as in any optimizer.

    Group keys: `lr`, `muon`, `momentum` and `parts`, into which rows divide as matrices of their own (Muon), `betas`, `eps` (AdamW),
    `weight_decay` (decoupled, both). Parameters of more than two dimensions, stacked experts, are stacks of matrices. `bf16`: the
    training is in bf16.
    """

    def __init__(self, groups: list[dict], *, weight_decay: float = 0.0, bf16: bool = False):
        self.bf16 = bf16
        super().__init__(groups, {"lr": 0.0, "muon": False, "momentum": 0.95, "parts": 1, "betas": (0.8, 0.95), "eps": 1e-8,
                                  "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (self._muon if group["muon"] else self._adamw)(group)
        return loss

    def _muon(self, group: dict) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                by_shape[p.shape].append(p)
        for shape, params in by_shape.items():
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            grads, momenta = [p.grad for p in params if p.grad is not None], [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            update = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))  # Nesterov
            update = update.unflatten(-2, (group["parts"], -1))
            scale = group["lr"] * max(1.0, update.size(-2) / shape[-1]) ** 0.5
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            update = orthogonalize(update, dtype=of_products(update.device.type) if self.bf16 or len(shape) == 3 else None)
            torch._foreach_add_(params, list(update.flatten(-3, -2)), alpha=-scale)

    def _adamw(self, group: dict) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p].update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        if not params:
            return
        adamw(
            params, [p.grad for p in params], [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params], [], [self.state[p]["step"] for p in params], foreach=True,
            amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)


def build_optimizer(model: PreTrainedModel, *, matrix_lr: float, lr: float, embedding_lr_factor: float = 10.0,
                    weight_decay: float = 0.0, bf16: bool = False) -> MuonAdamW:
    """Muon for the matrices inside the decoder layers, AdamW for embedding (at `embedding_lr_factor` times `lr`), head and norms.

    An expert's gate and up projection, which transformers keeps in one tensor, are two matrices as in a dense MLP.
    """
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    outer = {id(embedding)} | ({id(head.weight)} if head is not None else set())
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trainable if is_matrix(name, p) and id(p) not in outer and not name.endswith(PAIRED)]
    pairs = [p for name, p in trainable if name.endswith(PAIRED)]
    rest = [p for name, p in trainable if (not is_matrix(name, p) or id(p) in outer) and id(p) != id(embedding)]
    return MuonAdamW([
        {"params": matrices, "lr": matrix_lr, "muon": True},
        *([{"params": pairs, "lr": matrix_lr, "muon": True, "parts": 2}] if pairs else []),
        {"params": [embedding], "lr": lr * embedding_lr_factor},
        {"params": rest, "lr": lr}], weight_decay=weight_decay, bf16=bf16)
