"""Alarms in a training: what is logged, what stops, which checkpoint is kept, and that a resumed run does the same."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from reward.alarms import Limits, fit_cloud
from reward.model import build_ensemble, from_language_model, plain_model, write_ensemble
from reward.overoptimization import best_of_n, traced
from reward.verifiers import GoldScore
from stages.models.training import fit
from stages.rl import samples
from stages.rl.alarms import Watch, build_watchers, last_hidden
from stages.rl.curves import compare, draw_best_of_n
from stages.rl.measure import answers
from stages.rl.models import PolicyWithCritic
from stages.rl.rewards import Response, function_reward
from stages.rl.rollouts import Scored
from stages.run.checkpoint import is_complete
from tests.rl_tiny import END, PAD, VOCAB, classifier, policy, prompts, tokenizer, trainer
from tests.test_rl_trainer import assert_equal_weights, rows, weights

SAMPLING = {"seed": 0, "temperature": 1.0, "max_new_tokens": 6, "eos_ids": (END,), "pad_id": PAD}
OFF = dict.fromkeys(vars(Limits()))


def judged(golds: list[float]):
    """A judge whose opinion of all responses changes with the iteration that asks."""
    given = iter(golds)

    def judge(responses):
        gold = next(given)
        return [GoldScore(gold, False, 0.0, ()) for _ in responses]

    return judge


def small(directory: Path, watch: Watch, *, iterations: int = 8, golds: list[float] | None = None, **changes):
    """Two steps an iteration, so iteration i (from 0) is sampled by the checkpoint of step 2 i and logged at step 2 (i + 1)."""
    return trainer(directory, iterations=iterations, epochs=1, minibatches=2, micro_batch=8, watch=watch, missing_eos_penalty=None,
                   judge=judged(golds) if golds else None, arguments={"save_total_limit": 2}, **changes)


def steps_on_disk(directory: Path) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in (directory / "checkpoints").glob("checkpoint-*") if is_complete(p))


def scored(ids, score, gold=None, **watched):
    return Scored(Response({"id": "x"}, [5], ids, "", True), score, None if gold is None else GoldScore(gold, False, 0.0, ()),
                  *[torch.zeros(len(ids))] * 4, watched)


def test_metrics_by_hand():
    watch = Watch(watchers={"second": lambda responses: []})
    found = watch.metrics([scored([1, 2, 3, 4, 1, 2, 3, 4], 0.0, 0.2, second=1.0), scored([1, 2, 3], 1.0, 0.6, second=2.0)])
    assert found["response/repetition"] == pytest.approx(0.1) and found["score/q50"] == 0.5 and found["score/q99"] == pytest.approx(0.99)
    assert found["watch/second"] == 1.5 and found["watch/second_se"] == pytest.approx(0.5 / 2**0.5)
    assert found["objective/gold_se"] == pytest.approx(0.2 / 2**0.5) and found["score/beyond"] == 0.5
    assert "objective/gold_se" not in watch.metrics([scored([1], 0.0, second=0.0)])


def test_scores_beyond_those_of_the_first_iteration(tmp_path):
    t = small(tmp_path, Watch())
    t.state.log_history.append({"step": 2, "objective/score": 0.0, "score/q99": 3.0})
    assert t.watch.metrics([scored([1], 2.0), scored([1], 3.5), scored([1], 4.0), scored([1], 3.0)])["score/beyond"] == 0.5


def test_every_row_has_what_the_alarms_read(tmp_path):
    fit(small(tmp_path, Watch(Limits(**OFF), watchers={"length": lambda responses: [float(len(r.ids)) for r in responses]}),
              golds=[0.1] * 3, iterations=3))
    for row in rows(tmp_path):
        assert {"response/repetition", "score/q05", "score/q50", "score/q95", "score/q99", "score/beyond", "objective/gold_se"} <= set(row)
        assert row["watch/length"] == pytest.approx(row["response/length"]) and not any(key.startswith("alarm/") for key in row)


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_an_alarm_is_said_once_and_stops_if_it_shall(tmp_path, capsys, action):
    """Any KL is above -1: the alarm comes with the fifth row, which completes the window."""
    t = small(tmp_path, Watch(Limits(**{**OFF, "kl": -1.0}), action))
    fit(t)
    logged = rows(tmp_path)
    assert [row["step"] for row in logged if "alarm/kl" in row] == [10]
    assert capsys.readouterr().out.count("alarm at step 10: kl: the policy is") == 1
    assert logged[-1]["step"] == t.state.global_step == (10 if action == "stop" else 16)
    notes = t.watch.settle()
    assert [a["name"] for a in notes["alarms"]] == ["kl"] and notes["kept_step"] == notes["last_step"] == t.state.global_step
    if action == "stop":
        assert 10 in steps_on_disk(tmp_path)
        again = small(tmp_path, Watch(Limits(**{**OFF, "kl": -1.0}), action))
        fit(again)  # killed after it had stopped
        assert again.state.global_step == 10 and rows(tmp_path) == logged
        assert_equal_weights(weights(t.model), weights(again.model))
        assert again.watch.settle() == notes


def test_the_best_checkpoint_by_gold_stays_and_is_gone_back_to(tmp_path):
    """Gold is highest in rows 4 to 6, the last of which is of step 12, sampled by the checkpoint of step 10; one row alone is noise."""
    golds = [0.0, 0.8, 0.0, 0.5, 0.6, 0.7, 0.2, 0.1, 0.0, 0.0]
    t = small(tmp_path, Watch(Limits(**{**OFF, "gold_falls": 0.5}), "rollback"), golds=golds, iterations=10, reward=rising())
    fit(t)
    notes = t.watch.settle()
    assert notes["best_step"] == notes["kept_step"] == 10 and notes["last_step"] == t.state.global_step == rows(tmp_path)[-1]["step"]
    assert [a["name"] for a in notes["alarms"]] == ["gold_falls"] and notes["last_step"] == 14
    assert steps_on_disk(tmp_path) == [10, 14]
    best = small(tmp_path / "other", Watch())
    best.args.output_dir = t.args.output_dir
    best.load_step(10)
    assert_equal_weights(weights(t.model), weights(best.model))
    best.load_step(notes["last_step"])
    assert not torch.equal(weights(t.model)["policy.lm_head.weight"], weights(best.model)["policy.lm_head.weight"])


def rising():
    """A reward that rises with every call, whatever is scored."""
    calls = iter(range(1000))
    return lambda responses: torch.full((len(responses),), float(next(calls))) + torch.arange(len(responses)) / 100


def test_without_a_judge_the_last_checkpoint_before_the_alarm(tmp_path, capsys):
    t = small(tmp_path, Watch(Limits(**{**OFF, "kl": -1.0}), "rollback"))
    fit(t)
    assert t.watch.settle()["kept_step"] == 6 and "rolled back from step 10 to the checkpoint of step 6" in capsys.readouterr().out
    t = small(tmp_path / "late", Watch(Limits(**{**OFF, "kl": -1.0}), "rollback"), save_iterations=8)
    fit(t)
    assert steps_on_disk(tmp_path / "late") == [10], "what was trained must be there, whenever the next checkpoint was due"
    assert t.watch.settle()["kept_step"] == 10 and "set save_iterations lower" in capsys.readouterr().out


def test_a_judge_that_is_only_looked_at_does_not_choose_the_checkpoint(tmp_path):
    """The same run as above, its gold score highest at the checkpoint of step 10: the alarm comes with the row of step 10, which the
    checkpoint of step 8 has sampled, so that of step 6 is the last before it."""
    golds = [0.0, 0.8, 0.0, 0.5, 0.6, 0.7, 0.2, 0.1, 0.0, 0.0]
    t = small(tmp_path, Watch(Limits(**{**OFF, "kl": -1.0}), "rollback"), golds=golds, iterations=10, reward=rising())
    fit(t)
    assert t.watch.settle()["kept_step"] == 6


def test_going_back_to_less_than_the_start_is_said(tmp_path, capsys):
    golds = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    t = small(tmp_path, Watch(Limits(**{**OFF, "gold_falls": 0.5}), "rollback"), golds=golds, iterations=10, reward=rising())
    fit(t)
    t.watch.settle()
    assert "the start itself had the higher gold score" in capsys.readouterr().out


def test_resumed_run_has_the_same_alarms_samples_and_best_checkpoint(tmp_path, capsys):
    """From a checkpoint in the middle, when the rows before it have begun the window that raises the alarm."""
    def make(name):
        made = small(tmp_path / name, Watch(Limits(**{**OFF, "kl": -1.0}), shown=prompts(2), every=2), save_iterations=2)
        made.args.save_total_limit = None
        made.judge = lambda responses: [GoldScore(sum(r.ids) % 7 / 7, False, 0.0, ()) for r in responses]
        (tmp_path / name).mkdir(exist_ok=True)
        return made

    whole = make("whole")
    fit(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for step in (12, 16):
        shutil.rmtree(tmp_path / f"resumed/checkpoints/checkpoint-{step}")
    resumed = make("resumed")
    capsys.readouterr()
    fit(resumed)
    assert capsys.readouterr().out.count("samples at step") == 2
    assert resumed._initial_global_step == 8, "it must have resumed"
    assert rows(tmp_path / "whole") == rows(tmp_path / "resumed")
    assert (tmp_path / "whole/samples.jsonl").read_text() == (tmp_path / "resumed/samples.jsonl").read_text()
    assert resumed.watch.settle() == whole.watch.settle() and whole.state.best_global_step
    looks = [json.loads(line) for line in (tmp_path / "whole/samples.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [0, 4, 8, 12, 16] and all(len(look["samples"]) == 2 for look in looks)
    assert all(sample["kl"] == 0 for sample in looks[0]["samples"]) and any(sample["kl"] for sample in looks[-1]["samples"])


def test_samples_by_hand(tmp_path, capsys):
    model, start = policy(), policy(seed=5)
    reward = function_reward("tests.rl_tiny:early_letters")
    found = samples.look(model, start, tokenizer(), prompts(3), reward=reward, judge=judged([0.25]), **SAMPLING)
    again = samples.look(model, model, tokenizer(), prompts(3), reward=reward, judge=None, **SAMPLING)
    assert [s["response"] for s in found] == [s["response"] for s in again] and all(s["gold"] == 0.25 for s in found)
    assert all(s["kl"] == 0 and s["gold"] is None for s in again) and all(s["kl"] != 0 for s in found)
    first = found[0]
    assert first["score"] == pytest.approx(sum(x < "m" for x in first["response"].split()) / max(1, len(first["response"].split())))
    samples.record(tmp_path, 4, [{**first, "prompt": "long " * 40 + "end"}])
    out = capsys.readouterr().out
    assert "samples at step 4" in out and "..." in out and "long end" in out and max(map(len, out.splitlines())) < 180


def test_watchers_of_an_ensemble_and_a_second_model(tmp_path):
    start = policy()
    start.save_pretrained(tmp_path / "lm")
    heads = from_language_model(tmp_path / "lm", pad_id=PAD, seed=0, heads=3, random_head=True)
    responses = [Response(row, ids, [3 + i, 4, END], "", True) for i, (row, ids) in enumerate(prompts())]
    raw = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)).tolist()
    ensemble = build_ensemble([heads], raw, combination="mean", std_coef=1.0)
    expected = [ensemble.disagreement([of]) for of in ensemble.raw([r.prompt_ids + r.ids for r in responses])]
    write_ensemble(ensemble, tmp_path / "rm")
    plain_model(ensemble, raw).save_pretrained(tmp_path / "rm")
    classifier().save_pretrained(tmp_path / "second")
    limits = Limits(feature_distance=3.0)
    watchers = build_watchers({"model": 1.0}, limits, model_path=tmp_path / "rm", second=str(tmp_path / "second"), reference=start,
                              tokenizer=tokenizer(), prompts=prompts(), device=torch.device("cpu"), vocab_size=VOCAB, **SAMPLING)
    assert set(watchers) == {"second", "disagreement", "feature_distance"}
    assert watchers["disagreement"](responses) == pytest.approx(expected, rel=1e-4)
    assert float(torch.as_tensor(watchers["second"](responses)).std()) > 0
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    own = [r.prompt_ids + r.ids for r in answers(start, tokenizer(), prompts(), 1, **SAMPLING)]
    cloud = fit_cloud(last_hidden(scorer, own))
    assert watchers["feature_distance"](responses) == pytest.approx(
        cloud.distances(last_hidden(scorer, [r.prompt_ids + r.ids for r in responses])).tolist(), rel=1e-4)

    def watched(source, limits, second=None):
        return set(build_watchers({source: 1.0}, limits, model_path=tmp_path / "rm", second=second, reference=start, tokenizer=tokenizer(),
                                  prompts=prompts(), device=torch.device("cpu"), vocab_size=VOCAB, **SAMPLING))

    assert watched("verifier", limits) == watched("model@text", limits) == set()  # the policy's ids mean nothing to a reader of texts
    assert watched("model", Limits()) == {"disagreement"} and watched("model", Limits(disagreement=None)) == set()
    with pytest.raises(ValueError, match=r"second_reward 'verifier' has no config\.json"):
        watched("model", limits, second="verifier")


def test_last_hidden_state_is_what_the_score_is_read_from():
    model = classifier().eval()
    rows = [[3, 4, 5, 6], [7, 8], [9, 10, 11]]
    expected = [float(model(torch.tensor([row])).logits[0, 0].detach()) for row in rows]
    head = model.score.weight[0].detach().double().numpy()
    assert (last_hidden(model, rows, batch_size=2) @ head).tolist() == pytest.approx(expected, rel=1e-4)


def test_best_of_n_of_a_policy():
    """The gold is the proxy's negative: the best by one is the worst by the other."""
    found = draw_best_of_n(policy(), tokenizer(), prompts(4), samples=5, **SAMPLING,
                           reward=lambda responses: torch.tensor([float(sum(r.ids)) for r in responses]),
                           judge=lambda responses: [GoldScore(-float(sum(r.ids)), False, 0.0, ()) for r in responses])
    assert found.gold.shape == (4, 5) and abs(found.gold + found.proxy).max() < 1e-9
    assert (found.proxy[:, 1:] >= found.proxy[:, :-1] - 1e-9).all()
    assert found.proxy[:, 4].max() > found.proxy[:, 0].min()


def test_curves_of_a_run_and_of_best_of_n():
    logged = [{"step": 4 * i, "objective/kl": float(i), "objective/score": i**0.5, "objective/gold": i**0.5 - 0.4 * i} for i in range(12)]
    curves, metrics = compare(logged, best_of_n([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 0.0, 1.0]], [[0.0, 1.0, 2.0, 1.0], [1.0, 2.0, 0.0, 1.0]]))
    json.dumps(curves, allow_nan=False)
    assert curves["ppo"]["standing"]["place"] == "beyond the peak" and curves["ppo"]["kl"][-1] == 11.0
    assert metrics["best_of_n/gold"] == {"value": 1.0, "n": 2} and metrics["best_of_n/score"]["value"] == 3.0
    assert curves["best_of_n"]["n"] == [1, 2, 3, 4] and curves["best_of_n"]["gold"][0][0] == pytest.approx(1.0)
    distances, scores = traced({"form": "rl", "start": 1.0, "a": 2.0, "b": 1.0}, [1.0, 4.0], points=3)
    assert distances == [0.0, 1.0, 2.0] and scores == pytest.approx([1.0, 3.0, 1 + 4 - 2 * 0.693147], abs=1e-5)
    few, none = compare(logged[:5], None)
    assert few["ppo"]["fits"] is None and few["best_of_n"] is None and none == {}


def test_a_policy_with_a_critic_is_restored_whole(tmp_path):
    t = small(tmp_path, Watch(), iterations=2, model=PolicyWithCritic(policy(tie_word_embeddings=True), None, kl_coef=0.1))
    fit(t)
    last = weights(t.model)
    t.load_step(2)
    assert all(not torch.equal(last[name], weights(t.model)[name]) for name in ("value_head.weight", "policy.lm_head.weight"))
    assert t.model.policy.lm_head.weight.data_ptr() == t.model.policy.get_input_embeddings().weight.data_ptr()
