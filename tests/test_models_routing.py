"""Router losses by hand, equal however a step is divided; mixtures that plain transformers loads; health; upcycling."""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from stages.data.packing import PackedCollator, pack, to_dataset
from stages.models import optimizer
from stages.models.attention import DOCUMENTS
from stages.models.counts import count_parameters
from stages.models.optimizer import build_optimizer, of_products, orthogonalize
from stages.models.pretraining import PretrainConfig, PretrainTrainer
from stages.models.routing import BIAS, Routers, Routing, balance_loss, churn, dead, max_violation, sums, updated_bias
from stages.models.sizes import MIXTURES, build_decoder, decoder_config
from stages.models.training import fit, training_arguments
from stages.models.upcycling import upcycle
from stages.run.checkpoint import read_metrics
from tests.rl_tiny import END, PAD, policy, tokenizer

NO_Z = {"balance_coef": 1.0, "z_coef": 0.0}


def one_hot_logits(experts: list[list[int]], number: int) -> Routing:
    """A router that is nearly sure of these experts for each token."""
    chosen = torch.tensor(experts)
    return Routing(torch.full((len(experts), number), -20.0).scatter(1, chosen, 20.0), chosen)


def losses(routings: list[Routing]) -> torch.Tensor:
    """Balancing losses of a batch of its own."""
    n = len(routings[0].logits)
    found = sums(routings, torch.ones(n, dtype=torch.bool))
    return balance_loss(found.counts / n, found.probabilities / n)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_uniform_routing_costs_k(k):
    chosen = torch.tensor([[(token + i) % 6 for i in range(k)] for token in range(6)])
    assert losses([Routing(torch.zeros(6, 6), chosen)]).tolist() == pytest.approx([k])


def test_balance_loss_by_hand():
    # Three tokens, four experts, two each: f = (1, 1/3, 1/3, 1/3); P = mean of the three rows below.
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.4, 0.1, 0.3, 0.2], [0.7, 0.1, 0.05, 0.15]]).log()
    found = losses([Routing(logits, torch.tensor([[0, 1], [0, 2], [0, 3]]))])
    assert found.tolist() == pytest.approx([4 * (0.5 + (0.5 / 3 + 0.55 / 3 + 0.45 / 3) / 3)])


def test_layers_that_collapse_apart_are_caught_where_transformers_sees_balance():
    """Layer one sends every token to experts 0 and 1, layer two to 2 and 3."""
    layers = [one_hot_logits([[0, 1]] * 8, 4), one_hot_logits([[2, 3]] * 8, 4)]
    assert losses(layers).tolist() == pytest.approx([4.0, 4.0])  # of 2 where balanced
    assert load_balancing_loss_func(tuple(one.logits for one in layers), 4, 2).item() == pytest.approx(2.0)


def test_z_loss_entropy_and_padding_by_hand():
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0], [9.0, 0.0]])
    found = sums([Routing(logits, torch.tensor([[0], [1], [0]]))], torch.tensor([True, True, False]))
    log2 = torch.tensor(2.0).log().item()
    assert found.squares.item() == pytest.approx(2 * log2 ** 2) and found.entropy.item() == pytest.approx(2 * log2)
    assert found.counts.tolist() == [[1, 1]] and found.probabilities.tolist() == [[1, 1]]
    by_sigmoid = sums([Routing(torch.tensor([[3.0, 1.0]]).logit(1e-6), torch.tensor([[0]]))], torch.tensor([True]), sigmoid=True)
    assert by_sigmoid.probabilities.sum().item() == pytest.approx(1)


def test_health_by_hand():
    shares = torch.tensor([[0.5, 0.5, 0.5, 0.5], [1.0, 0.996, 0.004, 0.0]])
    assert max_violation(shares).tolist() == pytest.approx([0.0, 1.0])
    assert dead(shares).tolist() == [0, 2]
    before, after = torch.tensor([[[0, 1], [2, 3]], [[0, 1], [2, 3]]]), torch.tensor([[[1, 0], [2, 0]], [[1, 2], [0, 1]]])
    assert churn(before, after).tolist() == [0.25, 0.75]  # order does not matter
    assert updated_bias(torch.zeros(1, 3), torch.tensor([[1.5, 0.5, 1.0]]), 0.1).tolist() == [pytest.approx([-0.1, 0.1, 0.0])]


def decoder(architecture: str = "olmoe", **more):
    settings = {"hidden_size": 32, "num_layers": 2, "num_heads": 2} | ({"num_experts": 4} if architecture in MIXTURES else {}) | more
    model = build_decoder(decoder_config(tokenizer(), architecture=architecture, context_length=32, **settings), seed=0,
                          attn_implementation=DOCUMENTS)
    torch.manual_seed(0)
    for parameter in model.parameters():  # zeroed projections would hide the experts
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def rows(count: int = 16) -> torch.utils.data.Dataset:
    """Packed rows whose first half uses other letters than the second, so that routing differs between micro-batches, and padding."""
    texts = [[2 + (5 * i + j * (1 + i % 3)) % 13 + 13 * (i >= count) for j in range(3 + i % 9)] for i in range(2 * count)]
    packed = list(pack(texts, 16, eos_id=END, pad_id=PAD))
    assert len(packed) >= count and any(PAD in row for row in packed[:count])
    return to_dataset(packed[:count], 16, vocab_size=28)


class Stop(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train(folder: Path, *, micro: int = 8, processes: int = 1, stop: int | None = None, architecture: str = "olmoe", bias_rate: float = 0.0,
          checkpointing: bool = False, logging: int = 1, **coefficients):
    """Four steps of eight rows, checkpoints after the second and the fourth; the trainer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = PretrainConfig(optimizer="adamw", num_experts=4)
    model = decoder(architecture)
    arguments = TrainingArguments(**training_arguments(
        SimpleNamespace(directory=folder), seed=0, logging_steps=logging, save_steps=2, max_steps=4, per_device_train_batch_size=micro,
        gradient_accumulation_steps=8 // processes // micro, learning_rate=1e-3, adam_epsilon=1e-4, train_sampling_strategy="sequential",
        gradient_checkpointing=checkpointing))
    trainer = PretrainTrainer(
        model=model, args=arguments, train_dataset=rows(32), data_collator=PackedCollator(eos_id=END, pad_id=PAD), config=config,
        heldout_rows=rows(), routers=Routers(model, bias_rate=bias_rate, **{"balance_coef": 1.0, "z_coef": 0.1} | coefficients))
    if stop is not None:
        trainer.add_callback(Stop(stop))
    fit(trainer)
    return trainer


def logged(folder: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key.startswith("router/") or key == "train/loss"}
            for row in read_metrics(folder / "metrics.jsonl")]


def assert_equal(one: Path, other: Path, tolerance: float) -> None:
    a, b = (torch.load(path / "checkpoints" / "weights.pt") for path in (one, other))
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    for first, second in zip(logged(one), logged(other), strict=True):
        assert json.loads(json.dumps(second), parse_float=lambda x: pytest.approx(float(x), abs=1e-4)) == first


def saved(folder: Path, **settings) -> Path:
    trainer = train(folder, **settings)
    torch.save({name: p.detach().clone() for name, p in trainer.model.named_parameters()}, folder / "checkpoints" / "weights.pt")
    return folder


def test_a_step_in_one_batch_equals_one_in_eight(tmp_path):
    """f is that of all eight rows: with each micro-batch's own f the weights would differ (by 1e-3 here)."""
    assert_equal(saved(tmp_path / "one", micro=8), saved(tmp_path / "eight", micro=1), 1e-5)


def test_recomputed_activations_change_nothing(tmp_path):
    assert_equal(saved(tmp_path / "kept"), saved(tmp_path / "again", checkpointing=True), 1e-5)


TWO = """
import os, sys
from pathlib import Path
from accelerate import PartialState
PartialState(cpu=True, backend="gloo")
from stages.models.training import world_size
from stages.run.entry import stop_processes
from tests.test_models_routing import saved
assert world_size() == 2
saved(Path(sys.argv[1]), micro=int(sys.argv[2]), processes=2)
stop_processes()
sys.stdout.flush()
os._exit(0)  # as stages leave: gloo threads can abort a finished process on its way out
"""


@pytest.mark.parametrize("micro", [4, 2])
def test_two_processes_equal_one(tmp_path, micro):
    script = tmp_path / "run.py"
    script.write_text(TWO)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    pair = [subprocess.Popen([sys.executable, str(script), str(tmp_path / "two"), str(micro)], env={
        **os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RANK": str(r),
        "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true"}) for r in range(2)]
    assert [p.wait(timeout=300) for p in pair] == [0, 0]
    assert_equal(saved(tmp_path / "one"), tmp_path / "two", 1e-5)


def test_an_interrupted_run_logs_the_same(tmp_path):
    """Churn, too, which compares with the checkpoint before."""
    saved(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop=3)
    saved(tmp_path / "cut")
    assert_equal(tmp_path / "whole", tmp_path / "cut", 1e-6)
    assert [len(row.get("router/churn", [])) for row in logged(tmp_path / "whole")] == [0, 0, 0, 2]


def test_churn_at_a_checkpoint_between_logged_steps_has_its_tokens(tmp_path):
    train(tmp_path, logging=3)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert (last["step"], last["tokens"], len(last["router/churn"])) == (4, 4 * PretrainConfig().batch_tokens, 2)


def test_the_loss_of_a_step_has_both_parts(tmp_path):
    plain, both = (logged(saved(tmp_path / str(c), balance_coef=c, z_coef=c))[0] for c in (0.0, 0.5))
    assert both["train/loss"] - plain["train/loss"] == pytest.approx(0.5 * (both["router/balance_loss"] + both["router/z_loss"]), abs=1e-5)


def test_biases_move_towards_balance_and_are_saved(tmp_path):
    trainer = train(tmp_path, architecture="dots1", bias_rate=0.01, balance_coef=0.0)
    biases = torch.stack([m.get_buffer(BIAS) for m in trainer.routers.modules])
    assert biases.abs().max() > 0.005 and torch.allclose(biases / 0.01, (biases / 0.01).round(), atol=1e-4)
    load = torch.tensor(read_metrics(tmp_path / "metrics.jsonl")[0]["router/layers"]["load"])
    assert (biases.gather(1, load.argmin(1, keepdim=True)) > biases.gather(1, load.argmax(1, keepdim=True))).all()
    trainer.model.save_pretrained(tmp_path / "model")
    again = Routers(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    assert torch.equal(torch.stack([m.get_buffer(BIAS) for m in again.modules]), biases)
    with pytest.raises(ValueError, match=r"routers of olmoe have no bias.*architecture to dots1"):
        Routers(decoder(), bias_rate=0.01)


def test_padding_counts_for_nothing():
    """The same documents in rows twice as long: equal losses, loads and visits."""
    model = decoder()
    routers = Routers(model, balance_coef=1.0, z_coef=1.0)
    collator, found = PackedCollator(eos_id=END, pad_id=PAD), []
    for length in (16, 32):
        batch = collator([{"input_ids": [5, 6, 7, 8, END, 9, 5, END] + [PAD] * (length - 8)}])
        routers.begin_step(model, [batch], torch.device("cpu"))
        with routers.recording() as seen:
            model(**batch, use_cache=False)
        loss = routers.loss(seen, batch["input_ids"]).item()
        found.append((loss, routers.health()[1]["load"], routers.visits(model, batch)[0].tolist()))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5) and found[0][1:] == found[1][1:]
    assert sum(found[0][-1][0]) == 8 * 2 * 2  # tokens, layers, experts each


@pytest.mark.parametrize("architecture", MIXTURES)
def test_transformers_loads_what_was_built(tmp_path, architecture):
    model = decoder(architecture)
    model.save_pretrained(tmp_path)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and type(plain) is type(model)
    batch = PackedCollator(eos_id=END, pad_id=PAD)(list(rows(4)))
    with torch.no_grad():
        for inputs in (batch, {"input_ids": torch.arange(3, 15)[None], "position_ids": torch.arange(12)[None]}):
            inputs.pop("labels", None)
            torch.testing.assert_close(plain(**inputs, use_cache=False).logits, model(**inputs).logits, atol=2e-5, rtol=1e-4)
    dense = count_parameters(decoder_config(tokenizer(), hidden_size=32, num_layers=2, num_heads=2))
    counts = count_parameters(model)
    assert counts["experts"] // 2 + counts["mlp"] == pytest.approx(dense["mlp"], rel=0.03)  # as many visited


@pytest.mark.parametrize(("settings", "message"), [
    ({"architecture": "qwen3", "num_experts": 4}, "qwen3 has no experts"), ({}, "olmoe is a mixture of experts: set"),
    ({"num_experts": 4, "experts_per_token": 4}, "set it below their number"),
    ({"num_experts": 4, "shared_expert_size": 8}, "no shared expert"),
    ({"num_experts": 4, "shared_expert_size": 0, "architecture": "qwen2_moe"}, "always has a shared expert"),
    ({"num_experts": 4, "experts_per_token": 1, "architecture": "mixtral"}, "its router learns nothing"),
    ({"num_experts": 4, "shared_expert_size": 9, "expert_size": 8, "architecture": "dots1"}, "9 is not a multiple of 8")])
def test_experts_that_no_router_can_choose_from(settings, message):
    with pytest.raises(ValueError, match=message):
        decoder_config(tokenizer(), **{"architecture": "olmoe", "hidden_size": 32} | settings)


@pytest.mark.parametrize(("dense", "architecture"), [("qwen3", "qwen3_moe"), ("qwen2", "qwen2_moe"), ("llama", "mixtral")])
def test_an_upcycled_model_says_what_the_dense_one_said(tmp_path, dense, architecture):
    source = decoder(dense)
    source.save_pretrained(tmp_path)
    model = decoder(architecture, expert_size=96)
    batch = PackedCollator(eos_id=END, pad_id=PAD)(list(rows(4)))
    with torch.no_grad():
        apart = (model(**batch).logits - source(**batch).logits).abs().max()
        upcycle(model, str(tmp_path))
        torch.testing.assert_close(model(**batch).logits, source(**batch).logits, atol=1e-5, rtol=1e-5)
    assert apart > 0.1


def test_upcycling_refuses_what_would_not_be_equal(tmp_path):
    decoder("qwen3").save_pretrained(tmp_path)
    for model, folder, message in [
            (decoder("olmoe"), tmp_path, "qwen3, which does not become a olmoe"),
            (decoder("qwen3_moe"), tmp_path, "set hidden_size to 32, num_layers to 2, expert_size to 96"),
            (decoder("qwen3_moe", experts_per_token=1, expert_size=96), tmp_path, "set experts_per_token to 2"),
            (decoder("qwen3_moe", num_heads=4), tmp_path, "num_attention_heads is 4 here and 2"),
            (decoder("qwen3_moe"), tmp_path / "none", "has no model")]:
        with pytest.raises(ValueError, match=message):
            upcycle(model, str(folder))


def test_muon_takes_experts_one_by_one():
    model = decoder("qwen3_moe")
    optimizer = build_optimizer(model, matrix_lr=0.1, lr=0.1)
    experts = model.model.layers[0].mlp.experts
    before = experts.gate_up_proj.detach().clone(), experts.down_proj.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    gate, down = experts.gate_up_proj.grad[2, :48].clone(), experts.down_proj.grad[1].clone()
    optimizer.step()
    moved = before[0][2, :48] - experts.gate_up_proj[2, :48]
    bf16 = of_products("cpu")
    torch.testing.assert_close(moved, 0.1 * 1.5 ** 0.5 * orthogonalize(gate, dtype=bf16), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(before[1][1] - experts.down_proj[1], 0.1 * orthogonalize(down, dtype=bf16), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_muon_multiplies_matrices_in_bf16_where_the_training_is(bf16, monkeypatch):
    types = []
    monkeypatch.setattr(optimizer, "of_products", lambda device: torch.bfloat16)
    monkeypatch.setattr(optimizer, "orthogonalize", lambda update, dtype: types.append(dtype) or orthogonalize(update, dtype=dtype))
    model = policy()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    build_optimizer(model, matrix_lr=0.1, lr=0.1, bf16=bf16).step()
    assert set(types) == {torch.bfloat16 if bf16 else None}


@pytest.mark.parametrize("shape", [(3, 40, 24), (2, 2, 24, 40), (24, 24)])
def test_orthogonalised_in_pieces_and_in_bf16_as_at_once_in_float32(shape, monkeypatch):
    torch.manual_seed(0)
    update = torch.randn(shape)
    whole = orthogonalize(update)
    singular = torch.linalg.svdvals(whole)
    assert whole.shape == update.shape and singular.min() > 0.6 and singular.max() < 1.25
    u, _, v = torch.linalg.svd(update, full_matrices=False)
    assert torch.nn.functional.cosine_similarity((u @ v).flatten(), whole.flatten(), 0) > 0.97
    monkeypatch.setattr("stages.models.optimizer.TOGETHER", 1)
    torch.testing.assert_close(orthogonalize(update), whole, atol=1e-5, rtol=1e-5)
    rounded = orthogonalize(update, dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert 0.02 < (rounded - whole).norm() / whole.norm() * 2 < 0.1


@pytest.mark.slow
def test_the_stage_with_experts(smoke, tmp_path):
    """Killed and continued, health by kind of text, figures; then a second one that starts from the dense model of the recipe."""
    smoke.path("pretrain")
    flags = ["--architecture", "olmoe", "--num-experts", "4", "--run-dir", str(tmp_path / "olmoe")]
    smoke.killed("step:30", "pretrain", *flags)
    smoke.run("pretrain", *flags)
    notes = json.loads((tmp_path / "olmoe" / "manifest.json").read_text())["notes"]["routers"]
    assert set(notes["load_by_kind"]) >= {"worked", "direct"} and torch.tensor(notes["load"]).sum(1).tolist() == pytest.approx([4, 4])
    drawn = {path.name for path in (tmp_path / "olmoe" / "figures").glob("router-*.png")}
    assert drawn == {f"router-{name}.png" for name in ("max_vio", "dead", "entropy", "churn", "load")}
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "olmoe" / "model")).__name__ == "OlmoeForCausalLM"
    smoke.run("pretrain", "--architecture", "qwen3_moe", "--num-experts", "4", "--expert-size", "96", "--tokens", "1024", "--batch-tokens",
              "1024", "--upcycle", str(smoke.path("pretrain") / "model"), "--run-dir", str(tmp_path / "upcycled"))
    dense, upcycled = (json.loads((path / "manifest.json").read_text())["metrics"]["heldout_loss"]["value"]
                       for path in (smoke.path("pretrain"), tmp_path / "upcycled"))
    assert upcycled == pytest.approx(dense, abs=0.05)  # one step, at the warm-up's rate of 0
