"""Best-of-K by hand; stages.rejection_sampling on tiny random parents, interrupted and not; what it costs, recomputed."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages import ppo, rejection_sampling
from stages.data.curriculum import CUES
from stages.data.problems import read_problems
from stages.data.tokenizer import EOS
from stages.data.turns import IGNORED
from stages.models import adapters
from stages.models.counts import forward_flops, train_flops_per_token
from stages.rejection_sampling import RejectionSamplingConfig, main
from stages.rl import selection
from stages.rl.costs import cost_table, ppo_flops, price, ranking_flops, sampling_flops, score_table, spent, totals
from stages.rl.questions import asked
from stages.rl.rewards import Response, build_reward
from stages.rl.selection import choose, dialogues, sift
from stages.run.config import load_config
from tests.rl_tiny import END, config, tokenizer, write_parents
from tests.test_rl_stage import ROOT, environment, manifest

FLAGS = {"rounds": 2, "prompts-per-round": 12, "samples-per-prompt": 8, "chunk-prompts": 5, "max-new-tokens": 48, "batch-size": 2,
         "max-length": 160, "eval-problems": 6, "eval-samples": 2, "forgetting-rows": 4}


# ---- by hand ----


def test_choose_takes_the_best_that_end_and_the_first_of_equals():
    scores, whole = [1.0, 3.0, 2.0, 3.0, 9.0], [True, True, True, True, False]
    assert choose(scores, whole, keep=1, min_score=None) == [1]
    assert choose(scores, whole, keep=3, min_score=None) == [1, 3, 2]
    assert choose(scores, whole, keep=9, min_score=2.0) == [1, 3, 2]
    assert choose(scores, whole, keep=9, min_score=3.5) == []


def letters(text: str) -> list[int]:
    return [2 + ord(letter) - ord("a") for letter in text]


A, B, C, LONG = [*letters("a"), END], [*letters("bb"), END], [*letters("zzz"), END], letters("aaaa")
PROBLEM = {"id": "p", "answer": "7", "solutions": []}


def sifted(drawn: list[list[int]], **changes) -> dict:
    reward = build_reward({"tests.rl_tiny:early_letters": 1.0}, model_path=None, vocab_size=0)
    return sift([(PROBLEM, letters("xy"))], [drawn], tokenizer(), reward, **{"eos_ids": [END], "keep": 1, "min_score": None} | changes)[0]


def test_sift_counts_draws_and_scores_and_keeps_distinct_responses():
    row = sifted([C, A, A, LONG])
    assert row["score"] == pytest.approx((0 + 1 + 1 + 1) / 4) and row["best_score"] == 1
    assert row["tokens"] == 4 + 2 + 2 + 4 and row["responses"] == 4 and row["unfinished"] == 1
    assert row["scored"] == 3 and row["scored_tokens"] == (2 + 4) + (2 + 2) + (2 + 4)
    assert [kept["ids"] for kept in row["kept"]] == [A] and row["kept"][0]["text"] == "a"
    assert row["gold"] == pytest.approx((-.1 - .1 - .1 - .2) / 4)  # no answer sentence; one not finished besides
    assert [kept["ids"] for kept in sifted([B, A, A], keep=3)["kept"]] == [B, A]
    assert sifted([LONG, LONG])["kept"] == [] and sifted([C], min_score=0.5)["kept"] == []


def test_dialogues_hold_the_sampled_ids_and_watch_every_twentieth_prompt():
    rows = [sifted([[*letters("a" * length), END]]) for length in range(1, 23)]
    learned, watched = dialogues([*rows, sifted([LONG])])  # of the last nothing was kept
    assert [len(row["input_ids"]) - 3 for row in watched] == [1, 21]
    assert [len(row["input_ids"]) - 3 for row in learned] == [*range(2, 21), 22]
    assert learned[0] == {"input_ids": [*letters("xyaa"), END], "labels": [IGNORED, IGNORED, *letters("aa"), END]}
    assert dialogues(rows[:1])[0] == dialogues(rows[:1])[1] != []
    with pytest.raises(ValueError, match="none of 2 prompts has a response to keep: the best score is 1, and 2 of 3 responses did not end"):
        dialogues([sifted([LONG]), sifted([LONG, C], min_score=0.5)])


def test_what_was_sampled_is_learned_and_not_its_text_tokenised_anew(parents):
    """A response spelt byte by byte: the text would be encoded in fewer tokens."""
    bpe = AutoTokenizer.from_pretrained(parents / "sft" / "model")
    spelt = [bpe.convert_tokens_to_ids(letter) for letter in "answer"] + [bpe.eos_token_id]
    rows = sift([(PROBLEM, [7, 8])], [[spelt]], bpe, build_reward({"verifier": 1.0}, model_path=None, vocab_size=0),
                eos_ids=[bpe.eos_token_id], keep=1, min_score=None)
    learned, _ = dialogues(rows)
    assert learned[0]["labels"] == [IGNORED, IGNORED, *spelt]
    assert len(bpe(rows[0]["kept"][0]["text"])["input_ids"]) < len(spelt) - 1


def test_the_verifier_is_one_for_a_right_answer():
    reward = build_reward({"verifier": 2.0}, model_path=None, vocab_size=0)
    said = [Response(PROBLEM, [2], [3], text, True) for text in ("The answer is 7.", "The answer is 8.", "7 or so")]
    assert reward(said).tolist() == [2, 0, 0]


SMALL = {"vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4,
         "intermediate_size": 16, "pad_token_id": 0, "tie_word_embeddings": True}


def test_flops_by_hand():
    small = config(**SMALL)
    body, head, attention = 4 * 8 * 8 + 3 * 8 * 16, 10 * 8, 2 * 2 * 2 * 4 * 5  # scores and sums: 2 x 2 heads x 4 x 5 tokens, twice
    each = 2 * body + attention
    assert forward_flops(small, tokens=7, predicted=3, sequence_length=5) == each * 7 + 2 * head * 3
    assert forward_flops(small, tokens=9, predicted=9, sequence_length=5) * 3 == train_flops_per_token(small, 5) * 9
    policy, reader = each * 10 + 2 * head * 4, each * 10
    assert ppo_flops(small, small, [small], responses=2, prompt_tokens=6, tokens=4, epochs=2) == (
        (1 + 1 + 1 + 2 * 3) * policy + (1 + 2 * 3) * reader + reader)
    assert ppo_flops(small, None, [], responses=2, prompt_tokens=6, tokens=4, epochs=1) == 6 * policy
    more = ppo_flops(small, None, [small], responses=2, prompt_tokens=6, tokens=4, epochs=1, par_samples=2, ptx_tokens=10, ptx_row=5)
    assert more == (6 + 2) * policy + (1 + 2) * reader + 3 * (each * 10 + 2 * head * 10)


def test_flops_of_sampling_and_of_training_on_rankings_by_hand():
    small = config(**SMALL)
    body, head = 2 * (4 * 8 * 8 + 3 * 8 * 16), 2 * 10 * 8

    def attention(length):
        return 2 * 2 * 2 * 4 * length

    # 2 prompts of 3 tokens, 8 responses of 2: rows of 3 + 2, prompts read once
    assert sampling_flops(small, prompts=2, prompt_tokens=6, responses=8, tokens=16) == (body + attention(5)) * 22 + head * 16
    records = [{"prompt_ids": [1] * 3, "response_ids": [[1, 2], [1, 2, 3, 4]]}, {"prompt_ids": [1] * 5, "response_ids": [[1]] * 4}]
    length = (3 * 2 + 5 * 4 + 6 + 4) // 6  # of a prompt and a response
    once, apart = (body + attention(length)) * (3 + 5 + 10), (body + attention(length)) * (3 * 2 + 5 * 4 + 10)
    assert ranking_flops(small, records, passes=2.0, share_prompts=True) == 3 * 2 * once
    assert ranking_flops(small, records, passes=0.5, share_prompts=False, adapters=True, members=3) == 2 * 3 * apart / 2


TRAINED = {"dialogues": 1, "trained_tokens": 4, "steps": 1, "training_s": 2.0, "training_flops": 1000}


def test_a_rounds_costs_by_hand():
    small = config(**SMALL)
    rows = [{**sifted([A, A, B]), "seconds": 0.5}, {**sifted([LONG, LONG, C], min_score=0.5), "seconds": 0.25}]
    of = spent(rows, TRAINED, small, [small])
    assert (of["prompts"], of["empty_prompts"], of["responses"], of["unfinished"], of["scored"]) == (2, 1, 6, 2, 4)
    assert of["tokens"] == 2 + 2 + 3 + 4 + 4 + 4 and of["sampling_s"] == 0.75
    # prompts (2 tokens each) read once, responses of 19 / 6 tokens: rows of 2 + 3
    assert of["sampling_flops"] == forward_flops(small, tokens=4 + 19, predicted=19, sequence_length=5)
    assert of["scoring_flops"] == forward_flops(small, tokens=4 + 5 + 6 + 6, predicted=0, sequence_length=21 // 4)
    assert of["flops"] == of["sampling_flops"] + of["scoring_flops"] + 1000
    assert (of["score"], of["best_score"], of["kept_score"]) == (pytest.approx((1 + 2 / 3) / 2), 1, 1)
    second = spent([{**rows[1], "kept": []}], TRAINED, small, [])
    assert "kept_score" not in second and second["scoring_flops"] == 0
    assert totals([of, second])["responses"] == 9 and totals([of, second])["trained_tokens"] == 8
    assert [line.split() for line in score_table([of, second]).splitlines()][3][3] == "-"
    lines = cost_table([of, second]).splitlines()
    assert [line.split()[:6] for line in lines[2:]] == [
        ["1", "2", "50.0%", "6", "19", "4"], ["2", "1", "100.0%", "3", "12", "2"], ["all", "3", "66.7%", "9", "31", "6"]]
    assert "+0.5 a million tokens, +2 a teraFLOP" in price(0.25, {"responses": 8, "tokens": 500_000, "flops": 1.25e11})


# ---- the stage ----


@pytest.fixture(scope="module")
def parents(tmp_path_factory) -> Path:
    return write_parents(tmp_path_factory.mktemp("runs"))


def command(parents: Path, run_dir: Path, **flags) -> list[str]:
    given = {f"parents.{p}": parents / p for p in RejectionSamplingConfig.PARENTS} | {**FLAGS, **flags, "run-dir": run_dir}
    return [str(x) for name, value in given.items() for x in (f"--{name}", value)]


def configured(parents: Path, run_dir: Path, **flags) -> RejectionSamplingConfig:
    return load_config(RejectionSamplingConfig, command(parents, run_dir, **flags))


@pytest.fixture(scope="module")
def finished(parents, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("finished") / "rejection_sampling"
    result = subprocess.run([sys.executable, "-m", "stages.rejection_sampling", *command(parents, directory)], cwd=ROOT, env=environment(),
                            capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    for said in ("before (n=6)", "FLOPs: sampling", "best of K", "a teraFLOP", "base corpus: held-out loss"):
        assert said in result.stdout, result.stdout
    return directory


def sampled(directory: Path, number: int) -> list[dict]:
    files = sorted((directory / f"round-{number}" / "chunks").glob("*.json"))
    return [row for file in files for row in json.loads(file.read_text())["rows"]]


def test_products_metrics_and_costs_recompute_from_what_was_sampled(finished, parents):
    made = manifest(finished)
    counts, rounds = made["counts"], made["notes"]["rounds"]
    assert set(made["products"]) == {"model"}
    assert counts["responses"] == 2 * 12 * 8 and counts["prompts"] == 24 and len(rounds) == 2
    rows = [sampled(finished, number) for number in (1, 2)]
    assert len({row["id"] for row in rows[0]}) == 12 and {r["id"] for r in rows[0]} != {r["id"] for r in rows[1]}
    assert counts["tokens"] == sum(row["tokens"] for row in rows[0] + rows[1]) <= 192 * 48
    assert counts["empty_prompts"] == sum(not row["kept"] for row in rows[0] + rows[1]) > 0  # the random model seldom ends
    for number in (0, 1):
        assert 0 < rounds[number]["dialogues"] == len(dialogues(rows[number])[0])
        assert rounds[number]["trained_tokens"] == sum(len(each["input_ids"]) for each in dialogues(rows[number])[0])
        assert rounds[number]["score"] == pytest.approx(made["metrics"][f"round-{number + 1}/score"]["value"])
    assert counts["flops"] == sum(counts[f"{part}_flops"] for part in ("sampling", "scoring", "training"))
    assert min(counts[f"{part}_flops"] for part in ("sampling", "scoring", "training")) > 0
    metrics = made["metrics"]
    assert metrics["before/kl"]["value"] == 0 != metrics["after/kl"]["value"]
    assert metrics["change/base_loss"]["value"] == pytest.approx(metrics["after/base_loss"]["value"] - metrics["before/base_loss"]["value"])
    assert metrics["gain/gold"]["value"] == pytest.approx(metrics["after/gold"]["value"] - metrics["before/gold"]["value"])
    model, start = (AutoModelForCausalLM.from_pretrained(path) for path in (finished / "model", parents / "sft" / "model"))
    assert model.config.eos_token_id == start.config.eos_token_id
    assert torch.equal(model.lm_head.weight, start.lm_head.weight)  # adapters on the linear layers alone, merged
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, start.model.layers[0].mlp.up_proj.weight)
    assert (finished / "figures" / "scores.png").is_file() and not list(finished.rglob("checkpoint-*"))


def test_it_is_measured_as_ppo_is(finished, parents, tmp_path):
    """Before anything is learned the two stages give the same figures for the same start."""
    flags = {"iterations": 1, "rollout-batch": 4, "minibatches": 1, "micro-batch-size": 4, "eval-problems": 6, "eval-samples": 2,
             "max-new-tokens": 48, "probe-prompts": 0, "forgetting-rows": manifest(finished)["config"]["forgetting_rows"],
             "run-dir": tmp_path / "ppo"} | {f"parents.{p}": parents / p for p in RejectionSamplingConfig.PARENTS}
    made = ppo.main(load_config(ppo.PpoConfig, [str(x) for name, value in flags.items() for x in (f"--{name}", value)]))
    own = {name: value for name, value in manifest(finished)["metrics"].items() if name.startswith("before/")}
    assert "before/base_loss" in own and own == {name: value for name, value in made.metrics.items() if name.startswith("before/")}
    assert made.counts["flops"] > made.counts["tokens"] and made.counts["responses"] == 4


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("module", "name", "call"), [
    (rejection_sampling, "tune_round", 2), *(pytest.param(*each, marks=pytest.mark.slow) for each in (
        (rejection_sampling, "draw_responses", 5), (adapters, "merged", 2), (rejection_sampling, "measure", 2)))])
def test_an_interrupted_run_continues_to_the_same_result(finished, parents, tmp_path, monkeypatch, module, name, call):
    """Stopped in the second round's sampling, before its tuning, after it but before its model is saved, and at the end."""
    directory, calls, original = tmp_path / "rejection_sampling", [], getattr(module, name)

    def fails(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fails)
        with pytest.raises(Killed):
            main(configured(parents, directory))
    torch.manual_seed(99)  # another process would be elsewhere in its random numbers
    again = []
    doing = {repeated: getattr(rejection_sampling, repeated) for repeated in ("draw_responses", "tune")}
    for repeated, do in doing.items():
        monkeypatch.setattr(rejection_sampling, repeated, lambda *args, name=repeated, do=do, **more: (
            again.append(name), do(*args, **more))[1])
    made = main(configured(parents, directory))
    assert again == {"draw_responses": ["draw_responses"] * 2 + ["tune"], "measure": []}.get(name, ["tune"])  # three chunks a round
    whole = manifest(finished)
    assert made.metrics == whole["metrics"]
    assert set(made.counts) == set(whole["counts"])
    assert all(made.counts[key] == value for key, value in whole["counts"].items() if not key.endswith("_s"))  # seconds differ
    assert (directory / "model" / "model.safetensors").read_bytes() == (finished / "model" / "model.safetensors").read_bytes()
    assert made.data["provenance"]["attempts"] == 2
    assert main(configured(parents, directory)).fingerprint == made.fingerprint


def test_learning_what_ends_teaches_to_end(parents, tmp_path):
    """Kept are only responses that end, so a random model learns to: the loop as a whole moves the policy where selection points."""
    made = main(configured(parents, tmp_path / "rs", method="full", rounds=1, reward="{stages.rl.rewards:gold: 1.0}", **{
        "learning-rate": 1e-2, "epochs": 6, "prompts-per-round": 20, "eval-problems": 12, "eval-samples": 4}))
    gain = made.metrics["gain/eos_rate"]
    assert gain["value"] > 0.2 and gain["ci95"][0] > 0, gain
    assert made.counts["scoring_flops"] == 0 and made.counts["trained_tokens"] > 6 * 64 * made.counts["dialogues"] / 2


def test_from_start_each_round_tunes_the_first_model_on_everything_kept(parents, tmp_path, monkeypatch):
    bases, load = [], adapters.load_base
    monkeypatch.setattr(adapters, "load_base", lambda path, config: bases.append(path) or load(path, config))
    seeds, tune = [], rejection_sampling.tune
    monkeypatch.setattr(rejection_sampling, "tune", lambda m, t, config, **more: seeds.append(config.seed) or tune(m, t, config, **more))
    made = main(configured(parents, tmp_path / "rs", **{"from-start": True}))
    assert bases == [parents / "sft" / "model"] * 2
    rows = [sampled(tmp_path / "rs", number) for number in (1, 2)]
    assert made.data["notes"]["rounds"][1]["dialogues"] == len(dialogues(rows[0] + rows[1])[0]) > len(dialogues(rows[1])[0])
    main(configured(parents, tmp_path / "other"))
    assert [path.parent.name for path in bases[2:]] == ["sft", "round-1"]
    assert seeds == [1, 2, 1, 2]  # adapters begin elsewhere in each round


def test_a_verifier_needs_no_reward_model_and_prompts_too_long_are_counted(parents, tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "WATCHED", 2)
    lengths = sorted(len(row["prompt_ids"]) for row in tokenised(parents))
    config = configured(parents, tmp_path / "rs", reward="{verifier: 1.0}", rounds=1, **{
        "parents.reward_model": "nowhere", "max-length": lengths[-2] + 48, "forgetting-rows": 0, "prompts-per-round": 20})
    made = main(config)
    assert set(made.data["parents"]) == {"prepare", "sft"} and "after/base_loss" not in made.metrics
    assert made.counts["prompts_too_long"] == sum(n > lengths[-2] for n in lengths) > 0
    assert made.counts["prompts"] == 20  # the others come again, with other draws
    rows = sampled(tmp_path / "rs", 1)
    again = [(a, b) for a in rows for b in rows if a["id"] == b["id"] and a is not b]
    assert again and all(a["gold"] != b["gold"] or a["tokens"] != b["tokens"] for a, b in again)


def test_a_model_keeps_its_own_end_where_the_tokenizer_calls_another_token_so(parents, tmp_path):
    sft = shutil.copytree(parents / "sft", tmp_path / "sft")
    bpe = AutoTokenizer.from_pretrained(sft / "model")
    end, bpe.eos_token = bpe.eos_token_id, EOS
    bpe.save_pretrained(sft / "model")
    main(configured(parents, tmp_path / "rs", rounds=1, **{"parents.sft": sft, "forgetting-rows": 0}))
    assert bpe.eos_token_id != end == AutoModelForCausalLM.from_pretrained(tmp_path / "rs" / "model").config.eos_token_id


def tokenised(parents: Path) -> list[dict]:
    bpe = AutoTokenizer.from_pretrained(parents / "sft" / "model")
    rows = read_problems(parents / "prepare" / "problems" / "ppo.jsonl")
    return [{"prompt_ids": ids} for _, ids in asked(rows, CUES["worked"], bpe)]


@pytest.mark.parametrize(("flags", "message"), [
    ({"samples-per-prompt": 1}, "samples_per_prompt is 1: set it to 2 or more"), ({"rounds": 0}, "rounds is 0: set it to 1"),
    ({"keep": 8}, "keep 8 of samples_per_prompt 8 rejects nothing"), ({"reward": "{}"}, "reward has no source: set reward to"),
    ({"reward": "{modle: 1.0}"}, "neither `model`, `verifier`"), ({"temperature": 0.0}, "rejection_sampling learns from samples"),
    ({"min-score": 1e6}, "none of 12 prompts has a response to keep: the best score is .* lower min_score"),
    ({"tasks": "[no_such_task]"}, "choose from tasks"), ({"max-new-tokens": 150}, "set max_new_tokens to that or less"),
    ({"max-length": 60}, "set max_new_tokens lower"), ({"batch-size": 3, "micro-batch-size": 2}, "set micro_batch_size to a divisor")])
def test_settings_that_cannot_work_say_what_to_do(parents, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        main(configured(parents, tmp_path / "rs", **flags))
    assert not (tmp_path / "rs").exists()


@pytest.mark.slow
def test_two_processes_sample_and_learn_as_one(finished, parents, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes/accelerate/cpu-2.yaml")]
    result = subprocess.run([*launcher, "-m", "stages.rejection_sampling", *command(parents, tmp_path / "rs")], cwd=ROOT, env=environment(),
                            capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    one, two = manifest(finished), manifest(tmp_path / "rs")
    assert two["provenance"]["world_size"] == 2
    for key, entry in one["metrics"].items():
        assert two["metrics"][key]["value"] == pytest.approx(entry["value"], rel=2e-3, abs=2e-3), key
    for key in ("responses", "tokens", "scored", "dialogues", "trained_tokens", "empty_prompts"):
        assert two["counts"][key] == one["counts"][key], key
