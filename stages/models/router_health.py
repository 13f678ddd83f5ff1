"""What the routers of a trained mixture do on held-out text, and the figures of their health over the run (stages/models/routing.py)."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch

from stages.models.heldout import measured
from stages.models.routing import Routers, dead, max_violation
from stages.run import figures
from stages.run.manifest import metric

FIGURES = {"max_vio": "MaxVio (fullest over even load, less 1)", "dead": "dead experts",
           "entropy": "entropy of the router (nats a token)"}


def health(routers: Routers, model: torch.nn.Module, collator: Any, held: datasets.Dataset,
           kinds: Mapping[str, datasets.Dataset]) -> tuple[dict[str, Any], dict[str, dict]]:
    """For the notes: load of each expert (L, E), 1 being even, in `held` and in each kind of text, MaxVio and dead experts of each layer.
    For the metrics: MaxVio, mean over layers, and dead experts, their sum. Call on every process."""
    def visits(rows: datasets.Dataset) -> torch.Tensor:
        counts = torch.tensor([row for row, in measured(model, rows, collator, measure=routers.visits)])
        return counts.sum(0).view(len(routers.modules), -1).double()

    def load(counts: torch.Tensor) -> list[list[float]]:
        return (counts / counts.mean(-1, keepdim=True)).tolist()

    whole = visits(held)
    violation, gone, number = max_violation(whole), dead(whole), int(whole[0].sum()) // routers.top_k
    notes = {"load": load(whole), "load_by_kind": {kind: load(visits(rows)) for kind, rows in kinds.items()},
             "max_vio": violation.tolist(), "dead": gone.tolist()}
    return notes, {"router_max_vio": metric(float(violation.mean()), n=number), "router_dead": metric(int(gone.sum()), n=number)}


def draw(folder: Path, logged: list[dict[str, Any]], notes: Mapping[str, Any]) -> None:
    """MaxVio, dead experts and entropy of each layer over the run, churn between checkpoints, and who serves which kind of text."""
    rows = [row for row in logged if "router/layers" in row]
    layers = range(len(notes["max_vio"]))
    for name, label in FIGURES.items():
        figures.lines(folder / f"router-{name}.png", {
            f"layer {i}": ([r["tokens"] for r in rows], [r["router/layers"][name][i] for r in rows]) for i in layers}, x="tokens", y=label)
    saved = [row for row in logged if "router/churn" in row]
    if saved:
        figures.lines(folder / "router-churn.png", {
            f"layer {i}": ([r["tokens"] for r in saved], [r["router/churn"][i] for r in saved]) for i in layers}, x="tokens",
            y="share of a token's experts that is new")
    kinds = {"all": notes["load"], **notes["load_by_kind"]}
    figures.heat(folder / "router-load.png", {
        f"{layer}.{expert}": [kinds[kind][layer][expert] for kind in kinds] for layer in layers for expert in range(len(notes["load"][0]))},
        columns=list(kinds), y="layer.expert", legend="load (1 is even)")
