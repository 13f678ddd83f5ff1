"""Rollouts by vLLM: weights, log-probabilities and their correction, with a fake engine where vLLM is not installed."""
import copy
import dataclasses
import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.models.training import fit
from stages.ppo import PpoConfig, main
from stages.rl import generation
from stages.rl.models import PolicyWithCritic
from stages.rl.trainer import IMPORTANCE_CAP, PpoSettings
from stages.run.checkpoint import read_metrics
from tests.rl_tiny import END, adapted, classifier, policy, tokenizer, trainer
from tests.rl_vllm import MADE, install
from tests.test_rl_details import gradient, perturbed, stepped


def hot(**changes):
    return PolicyWithCritic(policy(**changes), classifier(**changes), temperature=0.7, kl_coef=0.05)


def test_without_noise_an_engines_run_is_that_of_the_own_sampler(tmp_path, monkeypatch):
    """Same responses, ratio 1, same losses, whichever sampled; and the column is there where an engine gave it alone."""
    install(monkeypatch)
    own, theirs = trainer(tmp_path / "own", model=hot()), trainer(tmp_path / "vllm", model=hot(), rollout_engine="vllm")
    fit(own)
    fit(theirs)
    a, b = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("own", "vllm"))
    assert len(a) == len(b) == 2
    for before, after in zip(a, b, strict=True):
        assert set(after) - set(before) == {"rollout/logprob_diff", "rollout/logprob_diff_max", "rollout/importance_ratio"}
        for name, value in before.items():
            assert after[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
        assert after["rollout/logprob_diff_max"] < 1e-4 and after["rollout/importance_ratio"] == pytest.approx(1, abs=1e-5)
    assert own.experience.engine_logprobs is None and "engine_logprobs" not in own.experience.inputs([0], 0)


def test_the_engine_has_the_newest_weights_at_each_rollout(tmp_path, monkeypatch):
    install(monkeypatch)
    t = trainer(tmp_path, rollout_engine="vllm")
    (fake,) = MADE
    seen = []
    generate = fake.generate
    fake.generate = lambda *given: (seen.append((copy.deepcopy(fake.policy.state_dict()), copy.deepcopy(t.model.policy.state_dict()))),
                                    generate(*given))[1]
    fit(t)
    assert len(seen) == 2
    for held, trained in seen:
        assert all(torch.equal(held[name], trained[name]) for name in trained)
    assert not torch.equal(seen[0][0]["lm_head.weight"], seen[1][0]["lm_head.weight"]), "the case needs a policy that learned"


def test_tokens_of_another_engine_weigh_what_the_trainer_thinks_of_them(tmp_path, monkeypatch):
    """The policy's gradient is that of advantages times min(pi / mu, 2), with padding and accumulation; the critic's stays."""
    install(monkeypatch, noise=0.15)
    t = trainer(tmp_path, model=hot(), rollout_engine="vllm", micro_batch=2, minibatches=2, missing_eos_penalty=None)
    batches = stepped(t, 0)
    e = t.experience
    (fake,) = MADE
    responses = e.responses
    assert len({len(r.ids) for r in responses}) > 1, "the case needs padding"
    weights = torch.zeros_like(e.logprobs)
    for i, r in enumerate(responses):
        both = []
        for model in (t.model.policy, fake.policy):
            logits = model(torch.tensor([r.prompt_ids + r.ids])).logits[0, len(r.prompt_ids) - 1:-1] / 0.7
            both.append(logits.log_softmax(-1).gather(-1, torch.tensor(r.ids)[:, None])[:, 0].detach())
        weights[i, -len(r.ids):] = (both[0] - both[1]).exp()
    ratios = weights[e.mask]
    assert (ratios > IMPORTANCE_CAP).any() and (ratios < 0.8).any(), "the case needs ratios on both sides, and above the cap"
    assert e.metrics["rollout/logprob_diff"] == pytest.approx(ratios.log().abs().mean().item(), rel=1e-3)
    assert e.metrics["rollout/logprob_diff_max"] == pytest.approx(ratios.log().abs().max().item(), rel=1e-3)
    assert e.metrics["rollout/importance_ratio"] == pytest.approx(ratios.mean().item(), rel=1e-3)

    weighed = gradient(t, batches)
    by_hand = e._replace(advantages=e.advantages * weights.clamp(max=2.0), engine_logprobs=None)
    plain = e._replace(engine_logprobs=None)
    for experience, same in ((by_hand, True), (plain, False)):
        t.experience = experience
        t.rollout = lambda iteration, given=experience: given
        other = gradient(t, stepped(t, 0))
        close = [torch.allclose(weighed[name], other[name], atol=1e-5, rtol=1e-3) for name in weighed if name.startswith("policy.")]
        assert all(close) == same
        assert all(torch.allclose(weighed[n], other[n], atol=1e-5, rtol=1e-3) for n in weighed if n.startswith("critic."))


def test_old_log_probs_stay_the_trainers(tmp_path, monkeypatch):
    """Clipping and KL are about the trainer's policy: the engine's numbers are weights and nothing else."""
    install(monkeypatch, noise=0.1)
    t = trainer(tmp_path, iterations=1, epochs=1, minibatches=1, micro_batch=16, rollout_engine="vllm", model=hot())
    fit(t)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["policy/approx_kl"] == pytest.approx(0, abs=1e-9) and row["policy/clip_fraction"] == 0 and row["objective/kl"] == 0
    assert row["rollout/logprob_diff"] > 0.01


def test_what_a_stop_string_cuts_off_has_no_weight(tmp_path, monkeypatch):
    install(monkeypatch, noise=0.1)
    letters = tokenizer()
    t = trainer(tmp_path, rollout_engine="vllm", stop_strings=tuple(letters.decode([i]) for i in range(7, 14)))
    e = t.rollout(0)
    shortened = [i for i, r in enumerate(e.responses) if r.ids[-1] in range(7, 14) and len(r.ids) < 8]
    assert shortened
    (fake,) = MADE
    for i in shortened:
        r = e.responses[i]
        logits = fake.policy(torch.tensor([r.prompt_ids + r.ids])).logits[0, len(r.prompt_ids) - 1:-1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(r.ids)[:, None])[:, 0].detach()
        torch.testing.assert_close(e.engine_logprobs[i, -len(r.ids):], expected, atol=1e-5, rtol=1e-5)


def test_a_log_prob_that_the_engine_does_not_know_corrects_nothing(tmp_path, monkeypatch):
    install(monkeypatch, noise=0.1, unknown=True)
    t = trainer(tmp_path, rollout_engine="vllm", iterations=1)
    fit(t)  # which stops at a loss that is no number
    e = t.experience
    assert int(e.engine_logprobs[e.mask].isnan().sum()) == len(e.responses)
    assert all(e.metrics[f"rollout/{name}"] > 0 for name in ("logprob_diff", "logprob_diff_max", "importance_ratio"))


def test_log_probs_of_another_temperature_show_in_the_ratio(tmp_path, monkeypatch):
    """Its mean is 1 for log-probs of what was sampled from, noise or none."""
    means = []
    for name, behaviour in (("right", {"noise": 0.05}), ("raw", {"reported_temperature": 1.0})):
        install(monkeypatch, **behaviour)
        t = trainer(tmp_path / name, rollout_engine="vllm", rollout_batch=128, micro_batch=64, model=PolicyWithCritic(
            policy(), classifier(), temperature=0.5))
        means.append(t.rollout(0).metrics["rollout/importance_ratio"])
    assert means[0] == pytest.approx(1, abs=0.1) and means[1] > 1.5


def test_an_engine_is_made_as_the_settings_say(tmp_path, monkeypatch):
    install(monkeypatch)
    trainer(tmp_path, rollout_engine="vllm", vllm_gpu_memory=0.4, model=hot())
    (fake,) = MADE
    assert (fake.mode, fake.gpu_memory_utilization, fake.temperature, fake.eos_ids) == ("colocate", 0.4, 0.7, [END])
    assert fake.max_model_length == 5 + 8  # the longest prompt, and a whole response


def test_the_stages_flags_are_the_trainers_settings():
    """The stage hands on what both have under one name; a name that differs would be a flag that does nothing."""
    flags, settings = ({field.name: field.default for field in dataclasses.fields(of) if field.name.startswith(("vllm", "rollout_engine"))}
                       for of in (PpoConfig, PpoSettings))
    assert flags == settings and len(flags) == 4


@pytest.mark.parametrize("reports", ["processed_logprobs", "raw_logprobs"])
def test_a_server_must_report_what_it_samples_from(tmp_path, monkeypatch, reports):
    class Client:
        def get_server_info(self):
            return {"model_config": {"logprobs_mode": reports}}

    install(monkeypatch, vllm_client=Client())

    def make():
        trainer(tmp_path, rollout_engine="vllm", vllm_mode="server", vllm_server_url="http://there:8001")

    if reports == "raw_logprobs":
        with pytest.raises(ValueError, match=r"at http://there:8001 reports log-probabilities as raw_logprobs.*start it as"):
            make()
    else:
        make()
        assert (MADE[0].mode, MADE[0].server_base_url) == ("server", "http://there:8001")


def test_what_cannot_work_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(generation._trl, "is_vllm_available", lambda: False)
    missing = r"vllm, which is not installed: pip install 'trl\[vllm\]' .* or set rollout_engine to transformers"
    with pytest.raises(ValueError, match=missing):
        trainer(tmp_path, rollout_engine="vllm")
    with pytest.raises(ValueError, match=missing):  # before it reads what the stages before it have made
        main(PpoConfig(rollout_engine="vllm", run_dir=str(tmp_path / "run"), parents={}))
    install(monkeypatch)
    with pytest.raises(ValueError, match=r"vllm and method lora: .*set method to full, or rollout_engine to transformers"):
        main(PpoConfig(rollout_engine="vllm", method="lora", run_dir=str(tmp_path / "run"), parents={}))
    with pytest.raises(ValueError, match="vllm and method lora"):
        trainer(tmp_path, rollout_engine="vllm", model=adapted()[0])
    with pytest.raises(ValueError, match=r"vllm_gpu_memory is 80\.0: set it to the share of a GPU"):
        PpoSettings(rollout_batch=8, vllm_gpu_memory=80.0)
    t = trainer(tmp_path, rollout_engine="vllm")
    monkeypatch.setattr(t.engine, "generate", lambda *given: ([], [], None, None))
    with pytest.raises(ValueError, match="returned no log-probabilities"):
        t.rollout(0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or importlib.util.find_spec("vllm") is None, reason="needs a CUDA device and vllm")
def test_vllm_itself_samples_from_the_policy(tmp_path):
    """On the first rollout and on that of a policy that has changed much."""
    letters = tokenizer()
    policy(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64).save_pretrained(tmp_path / "model")
    letters.save_pretrained(tmp_path / "model")
    model = PolicyWithCritic(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32), classifier(), temperature=0.8)
    t = trainer(tmp_path / "run", model=model, rollout_engine="vllm", arguments={"use_cpu": False}, epochs=1, minibatches=1, micro_batch=16)
    for iteration in range(2):
        metrics = t.rollout(iteration).metrics
        assert metrics["rollout/logprob_diff"] < 0.05 and metrics["rollout/importance_ratio"] == pytest.approx(1, abs=0.1)
        perturbed(t)
