"""PPO's models on one frozen base: equal to models of their own, a fraction of their memory, and the base never moves."""
import copy
import shutil
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from reward.model import normalize, score_ids
from stages.models import engines
from stages.models.training import fit
from stages.rl.adapters import CRITIC, POLICY, REWARD, Seen, reward_adapter
from stages.rl.models import PolicyWithCritic, pad_sequences, policy_stats
from stages.rl.rewards import model_reward, unit_scores
from tests.rl_tiny import PAD, VOCAB, adapted, classifier, policy, trainer, write_lora_reward
from tests.test_rl_trainer import assert_equal_weights, rows, weights


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """`sft/`, and a reward model trained by LoRA on it in `adapter/` and `model/`."""
    root = tmp_path_factory.mktemp("saved")
    policy().save_pretrained(root / "sft")
    write_lora_reward(root / "sft", root)
    return root


def layers(model) -> dict[str, BaseTunerLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def nudge(model) -> None:
    """The policy's adapter as after some training: its B is not zero."""
    torch.manual_seed(7)
    for layer in layers(model).values():
        torch.nn.init.normal_(layer.lora_B[POLICY].weight, std=0.1)


def test_four_models_on_one_base_equal_four_of_their_own(saved, tmp_path):
    """A rollout's log-probs, values and scores, and the gradients of a step: those of the matrices give those of the adapters."""
    model, _, scorer = adapted(saved / "sft", saved)
    nudge(model.policy)
    whole = AutoModelForCausalLM.from_pretrained(saved / "sft")
    with torch.no_grad():
        for name, layer in layers(model.policy).items():
            whole.get_submodule(name).weight += layer.get_delta_weight(POLICY)
    critic = AutoModelForSequenceClassification.from_pretrained(saved / "model", num_labels=1)
    shared = trainer(tmp_path / "shared", model=model, reward=partial(unit_scores, scorer))
    own = trainer(tmp_path / "own", model=PolicyWithCritic(whole, critic, kl_coef=0.05),
                  reward=model_reward(saved / "model", vocab_size=VOCAB))
    own.reference = AutoModelForCausalLM.from_pretrained(saved / "sft")
    for t in (shared, own):
        t.model.train()
        t.experience = t.rollout(0)
        t.current_gradient_accumulation_steps = 1
        inputs = t.experience.inputs([0, 3, 5, 6], PAD) | {"num_tokens": torch.tensor(20)}
        t.compute_loss(t.model, inputs).backward()
    one, other = shared.experience, own.experience
    assert [r.ids for r in one.responses] == [r.ids for r in other.responses] and one.values.std() > 0.1
    assert (one.logprobs - one.ref_logprobs).abs().max() > 0.1, "the policy has moved away from its reference"
    for name in ("logprobs", "ref_logprobs", "values", "returns"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=2e-5, rtol=1e-5)
    assert one.metrics == pytest.approx(other.metrics, rel=1e-4, abs=1e-5)
    for adapter, trained in ((POLICY, whole), (CRITIC, critic)):
        for name, layer in layers(model.policy).items():
            a, b, scale = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
            gradient = trained.get_submodule(name).weight.grad
            torch.testing.assert_close(a.grad, scale * b.T @ gradient, atol=1e-5, rtol=1e-3)
            torch.testing.assert_close(b.grad, scale * gradient @ a.T, atol=1e-5, rtol=1e-3)
            assert b.grad.abs().max() > 0 and layer.base_layer.weight.grad is None
    torch.testing.assert_close(model.critic.score.weight.grad, critic.score.weight.grad, atol=1e-5, rtol=1e-3)
    assert all(layer.lora_A[REWARD].weight.grad is None for layer in layers(model.policy).values())


def test_a_critic_adapter_begins_as_the_reward_model(saved):
    """Before a token that follows a response, it reads that response's score."""
    model, _, scorer = adapted(saved / "sft", saved)
    asked, said = [[4, 5, 6], [7, 8]], [[9, 10], [11, 12, 13, 14]]
    values = model(**pad_sequences(asked, [[*ids, 3] for ids in said], PAD)).values[:, -1]
    merged = AutoModelForSequenceClassification.from_pretrained(saved / "model", num_labels=1)
    whole = [*map(list.__add__, asked, said)]
    torch.testing.assert_close(values.tolist(), normalize(merged.config, score_ids(merged, whole)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(score_ids(scorer, whole), score_ids(merged, whole), atol=1e-5, rtol=1e-5)
    assert values.std() > 0.1


def test_the_reward_model_scores_on_a_base_that_an_engine_has_cast(saved):
    """DeepSpeed in bf16 casts the policy, with all adapters on it, and not the reward model's head, which it does not train."""
    model, _, scorer = adapted(saved / "sft", saved)
    rows = [[4, 5, 6, 9, 10], [7, 8, 11, 12, 13, 14]]
    whole = score_ids(scorer, rows)
    model.bfloat16()
    torch.testing.assert_close(score_ids(scorer, rows), whole, atol=0.05, rtol=0.05)
    assert model(**pad_sequences([[4, 5, 6]], [[9, 10]], PAD)).values.isfinite().all()


def test_the_reference_is_the_base_and_no_step_moves_it(saved, tmp_path):
    model, _, scorer = adapted(saved / "sft", saved)
    t = trainer(tmp_path, model=model, reward=partial(unit_scores, scorer))
    inputs = pad_sequences([[4, 5, 6], [7]], [[9, 10], [11, 12, 13]], PAD)
    start = weights(model)
    fit(t)
    after = weights(model)
    moved = {name for name in start if not torch.equal(start[name], after[name])}
    assert moved == {name for name in start if {POLICY, CRITIC} & set(name.split(".")) or name == "critic.score.weight"}
    fresh, _, _ = policy_stats(AutoModelForCausalLM.from_pretrained(saved / "sft"), inputs, 1.0)
    with torch.no_grad():
        torch.testing.assert_close(policy_stats(t.reference, inputs, 1.0)[0], fresh, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(policy_stats(model.policy, inputs, 1.0)[0], fresh, atol=1e-3)
    assert rows(tmp_path)[0]["policy/approx_kl"] >= 0 and rows(tmp_path)[0]["objective/kl"] == pytest.approx(0, abs=1e-6)


def storage(*modules) -> int:
    """Bytes of the distinct storages of parameters and buffers."""
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for module in modules
            for tensor in [*module.parameters(), *module.buffers()]}
    return sum(held.values())


def test_four_roles_hold_one_base(tmp_path):
    size = {"hidden_size": 128, "intermediate_size": 256}
    policy(**size).save_pretrained(tmp_path / "sft")
    write_lora_reward(tmp_path / "sft", tmp_path)
    model, _, scorer = adapted(tmp_path / "sft", tmp_path)
    t = trainer(tmp_path / "run", model=model, reward=partial(unit_scores, scorer))
    base = storage(policy(**size))
    shared = storage(model, scorer, t.reference.model)
    assert base < shared < 1.5 * base
    own = trainer(tmp_path / "own", model=PolicyWithCritic(policy(**size), classifier(**size)))
    assert storage(own.model, own.reference, classifier(**size)) > 3.9 * base


def test_resumed_equals_uninterrupted_and_checkpoints_hold_what_trains(saved, tmp_path):
    def make(name):
        model, _, scorer = adapted(saved / "sft", saved)
        return trainer(tmp_path / name, iterations=3, model=model, reward=partial(unit_scores, scorer), kl_target=0.05, kl_horizon=100)

    whole = make("whole")
    fit(whole)
    kept = safetensors.torch.load_file(tmp_path / "whole/checkpoints/checkpoint-8/model.safetensors")
    assert set(kept) == {name for name, p in whole.model.named_parameters() if p.requires_grad} | {"kl_coef"}
    assert "critic.score.weight" in kept and not any("base_layer" in name or REWARD in name for name in kept)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/checkpoint-12")
    resumed = make("resumed")
    fit(resumed)
    assert resumed._initial_global_step == 8, "it must have resumed"
    assert_equal_weights(weights(whole.model), weights(resumed.model))
    assert rows(tmp_path / "whole") == rows(tmp_path / "resumed")


def test_each_adapter_has_its_learning_rate_and_its_norm(tmp_path):
    model, _, _ = adapted()
    t = trainer(tmp_path, model=model, learning_rate=1e-3, critic_learning_rate=2e-3)
    policy_group, critic_group = t.create_optimizer().param_groups
    names = {p: name for name, p in model.named_parameters()}
    assert all(POLICY in names[p].split(".") for p in policy_group["params"]) and policy_group["lr"] == 1e-3
    assert all(CRITIC in names[p].split(".") for p in critic_group["params"]) and critic_group["lr"] == 2e-3
    assert len(policy_group["params"]) + 1 == len(critic_group["params"]) == 2 * len(layers(model.policy)) + 1


def test_two_adapters_with_recomputed_activations_are_refused():
    model, _, _ = adapted()
    inputs = pad_sequences([[4, 5, 6]], [[9, 10]], PAD)
    model(**inputs)
    model.policy.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="two adapters on one base and gradient checkpointing"):
        model(**inputs)
    with torch.no_grad():  # nothing is recomputed
        model(**inputs)


def test_adapters_on_an_engine_that_divides_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "divides_weights", lambda trainer: True)
    with pytest.raises(ValueError, match="launch PPO with DDP or ZeRO-2, or set method to full"):
        trainer(tmp_path, model=adapted()[0])


def test_the_policys_adapter_is_active_again_after_an_error(monkeypatch):
    model, _, _ = adapted()
    monkeypatch.setattr(model.policy.model, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        Seen(model.policy.model, CRITIC)()
    assert all(layer._active_adapter == [POLICY] for layer in layers(model.policy).values())


def test_a_reward_adapter_of_another_base_is_not_used(saved, tmp_path, capsys):
    class Parent:
        data = {"products": {"adapter": {}}}

        def product(self, name):
            return saved / name

    assert reward_adapter(Parent(), saved / "sft") == saved / "adapter"
    policy(seed=5).save_pretrained(tmp_path / "sft")
    assert reward_adapter(Parent(), tmp_path / "sft") is None and "begins without an opinion" in capsys.readouterr().out
    bare = copy.copy(Parent())
    bare.data = {"products": {}}
    assert reward_adapter(bare, saved / "sft") is None and "loaded whole" in capsys.readouterr().out


def test_an_adapter_with_more_than_layers_and_head_is_refused(saved, tmp_path):
    shutil.copytree(saved / "adapter", tmp_path / "adapter")
    (tmp_path / "model").symlink_to(saved / "model")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace('"score"', '"score", "embed_tokens"'))
    with pytest.raises(ValueError, match="which a shared base cannot hold"):
        adapted(saved / "sft", tmp_path)


def test_an_adapter_whose_beginning_changes_the_base_is_refused(saved, tmp_path):
    """Put on again it would change it again, and the reference would not be the SFT model."""
    shutil.copytree(saved / "adapter", tmp_path / "adapter")
    (tmp_path / "model").symlink_to(saved / "model")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace('"init_lora_weights": true', '"init_lora_weights": "pissa"'))
    with pytest.raises(ValueError, match="'pissa', which changes the base"):
        adapted(saved / "sft", tmp_path)
