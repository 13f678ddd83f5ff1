"""stages.ppo as users run it: the real command on tiny random parents; kill and resume; two processes."""
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from prompts.templates import BENCHMARK_CUES
from stages import ppo
from stages.data.packing import PackedCollator
from stages.data.tokenizer import END, document_end
from stages.models.heldout import heldout
from stages.ppo import PpoConfig, main, own_problems
from stages.run.config import load_config
from tests.rl_tiny import PROMPTS_SEEN, write_parents

ROOT = Path(__file__).parent.parent
FLAGS = {"iterations": 4, "rollout-batch": 8, "minibatches": 2, "micro-batch-size": 2, "max-new-tokens": 8, "save-iterations": 1,
         "eval-problems": 6, "eval-samples": 2, "sample-iterations": 2, "best-of": 5, "probe-prompts": 4, "forgetting-rows": 4}


@pytest.fixture(scope="module")
def parents(tmp_path_factory) -> Path:
    """Folders of prepare, sft and reward_model with a real tokenizer and random models."""
    return write_parents(tmp_path_factory.mktemp("runs"))


def command(parents: Path, run_dir: Path, *launcher: str, **flags) -> list[str]:
    given = {**FLAGS, "run-dir": run_dir} | {f"parents.{p}": parents / p for p in ("prepare", "sft", "reward_model")} | flags
    return [*(launcher or (sys.executable,)), "-m", "stages.ppo", *(str(x) for name, value in given.items() for x in (f"--{name}", value))]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def run(line: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False)


def manifest(directory: Path) -> dict:
    return json.loads((directory / "manifest.json").read_text())


@pytest.fixture(scope="module")
def finished(parents, tmp_path_factory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("finished") / "ppo"
    result = run(command(parents, directory))
    assert result.returncode == 0, result.stderr
    return directory, result.stdout


def test_products_and_metrics(finished, parents):
    directory, output = finished
    metrics = manifest(directory)["metrics"]
    for group in ("before", "after", "gain"):
        for name in ("gold", "sampled_accuracy", "greedy_accuracy", "score", "kl", "entropy", "length", "eos_rate"):
            entry = metrics[f"{group}/{name}"]
            low, high = entry.get("ci95", (entry["value"], entry["value"]))  # figures without any spread have no interval
            assert entry["n"] == 6 and low <= entry["value"] <= high
    assert metrics["before/kl"]["value"] == 0 and metrics["after/kl"]["value"] != 0
    assert metrics["gain/gold"]["value"] == pytest.approx(metrics["after/gold"]["value"] - metrics["before/gold"]["value"])
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    assert model.config.eos_token_id == tokenizer.convert_tokens_to_ids(END) == tokenizer.eos_token_id
    start = AutoModelForCausalLM.from_pretrained(parents / "sft" / "model")
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    critic = AutoModelForSequenceClassification.from_pretrained(directory / "critic")
    assert critic.config.score_std == 0.5
    assert (directory / "figures" / "scores.png").is_file()
    assert "before (n=6)" in output and "objective/score" in output


def test_the_alignment_tax_is_measured(finished, parents):
    """The loss on the base corpus, recomputed from the saved models, and greedy answers to problems of all tasks."""
    directory, _ = finished
    metrics = manifest(directory)["metrics"]
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    rows = load_from_disk(str(parents / "prepare" / "tokens" / "heldout")).select(range(4))
    collator = PackedCollator(eos_id=document_end(tokenizer), pad_id=tokenizer.pad_token_id)
    for when, folder in (("before", parents / "sft"), ("after", directory)):
        found = heldout(AutoModelForCausalLM.from_pretrained(folder / "model"), rows, collator)["heldout_loss"]
        assert metrics[f"{when}/base_loss"]["value"] == pytest.approx(found["value"], rel=1e-5)
        assert metrics[f"{when}/worked_accuracy"]["n"] == metrics[f"{when}/direct_accuracy"]["n"] == 4
    assert metrics["change/base_loss"]["value"] != 0 and metrics["change/worked_accuracy"]["n"] == 4
    assert metrics["after/kl_to_base"]["value"] > 0


def test_samples_curves_and_alarms(finished):
    directory, output = finished
    looks = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [0, 4, 8] and all(len(look["samples"]) == 4 for look in looks)  # every 2 iterations of 4
    assert output.count("samples at step") == 3 and all(sample["kl"] == 0 for sample in looks[0]["samples"])
    curves, made = json.loads((directory / "overoptimization.json").read_text()), manifest(directory)
    assert curves["ppo"]["step"] == [2, 4, 6, 8] and curves["best_of_n"]["n"] == [1, 2, 3, 4, 5] and curves["best_of_n"]["prompts"] == 6
    assert made["metrics"]["best_of_n/score"]["value"] == curves["best_of_n"]["proxy"][-1][0] >= curves["best_of_n"]["proxy"][0][0]
    assert curves["best_of_n"]["kl"][-1] == pytest.approx(0.8094, abs=1e-4)
    assert made["notes"]["on_alarm"] == "warn" and made["notes"]["kept_step"] == made["notes"]["last_step"] == 8
    logged = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == 4 and made["notes"]["alarms"] == []
    assert not any(name.startswith("watch/") for row in logged for name in row)  # what costs another forward pass is off unless asked for


def test_an_alarm_ends_the_stage_and_leaves_the_best_checkpoint(parents, tmp_path):
    flags = {"iterations": 8, "on-alarm": "rollback", "alarm-limits": "{kl: -9, feature_distance: 9000}", "best-of": 0,
             "second-reward": parents / "reward_model" / "model", "sample-iterations": 0}
    result = run(command(parents, tmp_path / "ppo", **flags))
    assert result.returncode == 0, result.stderr
    made = manifest(tmp_path / "ppo")
    notes = made["notes"]
    assert notes["last_step"] == 10 and notes["kept_step"] == notes["best_step"] in (2, 4, 6, 8)
    assert "kl" in {alarm["name"] for alarm in notes["alarms"]} and made["counts"]["responses"] == 5 * 8
    assert f"rolled back from step 10 to the checkpoint of step {notes['best_step']}" in result.stdout
    saved = safetensors.torch.load_file(tmp_path / "ppo" / "checkpoints" / f"checkpoint-{notes['best_step']}" / "model.safetensors")
    product = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo" / "model")
    assert torch.equal(product.lm_head.weight, saved["policy.lm_head.weight"]) and (tmp_path / "ppo/checkpoints/checkpoint-10").is_dir()
    rows = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["watch/second"] == pytest.approx(row["objective/score"], rel=1e-4) for row in rows) and "alarm/kl" in rows[-1]
    assert all(row["watch/feature_distance"] > 0 for row in rows)
    assert not (tmp_path / "ppo" / "samples.jsonl").exists() and "best_of_n/gold" not in made["metrics"]


def test_second_run_does_nothing(finished, parents):
    result = run(command(parents, finished[0]))
    assert result.returncode == 0 and "is finished" in result.stdout and "step" not in result.stdout


def test_shared_trunk_with_a_function_as_reward(parents, tmp_path):
    flags = {"value-trunk": "shared", "reward": "{stages.rl.rewards:gold: 1.0}", "iterations": 1}
    result = run(command(parents, tmp_path / "ppo", **flags))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "ppo" / "critic" / "value_head.safetensors").is_file()
    metrics = manifest(tmp_path / "ppo")["metrics"]
    assert metrics["after/score"]["value"] == pytest.approx(metrics["after/gold"]["value"])


def test_every_option_of_the_reward_and_the_loss_together(parents, tmp_path):
    """PAR, length penalty, stop strings, k2 in the loss and PPO-ptx through the whole stage; their price is in the FLOPs."""
    flags = {"iterations": 1, "epochs": 2, "reward": "{verifier: 1.0}", "save-iterations": 1}
    plain = main(configured(parents, tmp_path / "plain", **flags))
    made = main(configured(parents, tmp_path / "ppo", **flags, **{
        "par-samples": 2, "length-penalty": 0.01, "stop-strings": '["1", "a"]', "kl-loss-coef": 0.1, "ptx-coef": 0.5}))
    (row,) = map(json.loads, (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines())
    assert row["loss/ptx"] > 0 and row["objective/shaped_score"] == pytest.approx(row["objective/rlhf_reward"], abs=1e-5)  # no KL yet
    assert row["objective/shaped_score"] < row["objective/score"] + 0.4  # PAR turns scores that are all 0 into .5, less the length's price
    assert row["objective/shaped_score"] != row["objective/score"]
    assert made.metrics["before/eos_rate"]["value"] > plain.metrics["before/eos_rate"]["value"]  # measured with the same stops
    assert made.data["counts"]["flops"] > plain.data["counts"]["flops"]


def test_bad_input_gives_one_line(parents, tmp_path):
    result = run(command(parents, tmp_path / "ppo", tasks="[no_such_task]"))
    assert result.returncode == 2 and result.stderr.count("error:") == 1 and "choose from tasks ['" in result.stderr
    assert not (tmp_path / "ppo").exists()


@pytest.mark.parametrize(("flags", "message"), [
    ({"difficulties": "[9]"}, "and difficulties \\[1, 2"), ({"max-new-tokens": 150}, "set max_new_tokens to that or less"),
    ({"micro-batch-size": 3}, "set micro_batch to one of"), ({"temperature": 0.0}, "set it above 0"), ({"reward": "{}"}, "no source"),
    ({"eval-problems": 1}, "set it to 2 or more")])
def test_settings_that_cannot_work_say_what_to_do(parents, tmp_path, flags, message):
    config = load_config(PpoConfig, command(parents, tmp_path / "ppo", **flags)[3:])
    with pytest.raises(ValueError, match=message):
        main(config)


def gsm8k_file(path: Path, count: int) -> Path:
    rows = [{"question": f"Tom has {i % 16} pens. He buys 2. How many now?", "answer": f"{i} + 2 = <<{i}+2={i + 2}>>{i + 2}\n#### {i + 2}"}
            for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configured(parents: Path, run_dir: Path, **flags) -> PpoConfig:
    return load_config(PpoConfig, command(parents, run_dir, **flags)[3:])


def test_last_of_own_problems_are_held_out_and_never_learned_from(parents, tmp_path):
    config = configured(parents, tmp_path / "ppo", problems=f"gsm8k:{gsm8k_file(tmp_path / 'a.jsonl', 20)}", **{"eval-problems": 5})
    learned, measured = own_problems(config)
    assert [r["id"] for r in measured] == [f"gsm8k-{i}" for i in range(15, 20)]
    assert [r["id"] for r in learned] == [f"gsm8k-{i}" for i in range(4, 15)]  # 0 to 3 ask what 16 to 19 ask
    assert all(r["solutions"] == [] for r in learned + measured) and measured[0]["answer"] == "17"
    assert own_problems(configured(parents, tmp_path / "ppo")) is None


def test_ppo_on_own_problems(parents, tmp_path, monkeypatch):
    """A gsm8k file through the whole stage: asked as the evaluation asks, judged by its answers, and hashed into the run."""
    file, cues = gsm8k_file(tmp_path / "a.jsonl", 16), []
    monkeypatch.setattr(ppo, "asked", lambda rows, cue, tokenizer, asked=ppo.asked: cues.append(cue) or asked(rows, cue, tokenizer))
    config = configured(parents, tmp_path / "ppo", problems=f"mine=gsm8k:{file}", iterations=1, reward="{stages.rl.rewards:gold: 1.0}")
    made = main(config)
    assert made.metrics["after/gold"]["n"] == 6
    assert made.metrics["after/score"]["value"] == pytest.approx(made.metrics["after/gold"]["value"])
    assert set(cues) == {BENCHMARK_CUES["worked"]} and set(made.data["inputs"]) == {"problems"}
    assert main(config).fingerprint == made.fingerprint and len(cues) == 2  # finished: nobody was asked again
    with pytest.raises(ValueError, match=r"the shortest of 8 prompts .* more than .* the model.s context of .*; set max_new_tokens lower"):
        main(dataclasses.replace(config, max_new_tokens=9999))


def test_a_rule_as_reward_on_a_file_of_which_nothing_is_solved(parents, tmp_path, capsys):
    """As recipes/gsm8k/ppo.yaml, without a reward model anywhere: scores are all 0, and one question is longer than the context."""
    file = gsm8k_file(tmp_path / "a.jsonl", 20)
    file.write_text("\n".join([json.dumps({"question": "How many? " * 99, "answer": "#### 1"}), *file.read_text().splitlines(),
                               json.dumps({"question": "How few? " * 99, "answer": "#### 1"})]))  # the last are measured on
    rule = {"problems": f"gsm8k:{file}", "reward": "{verifier: 1.0}", "best-of": 0, "parents.reward_model": tmp_path / "none"}
    with pytest.raises(ValueError, match="none has no finished run: set value_trunk to shared"):
        main(configured(parents, tmp_path / "ppo", **rule))
    made = main(configured(parents, tmp_path / "ppo", **rule, **{"value-trunk": "shared", "missing-eos-penalty": "null"}))
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward/zero_variance"] for row in rows] == [1.0] * 4 and all(row["objective/score"] == 0.0 for row in rows)
    assert rows[0]["value/explained_variance"] == 0.0  # nothing to explain is no perfect critic, of which any signal would be a fall
    assert printed.count("warning: all 8 responses of a rollout have the score 0") == 1
    assert "(1 left out, too long), 5 to measure on (1 too long)" in printed
    assert made.data["counts"]["prompts_too_long"] == made.data["counts"]["held_out_too_long"] == 1
    assert made.data["notes"]["alarms"] == [] and set(made.data["parents"]) == {"prepare", "sft"}
    assert made.metrics["after/greedy_accuracy"] == {"value": 0.0, "n": 5, "ci95": made.metrics["after/greedy_accuracy"]["ci95"]}


@pytest.mark.parametrize(("flags", "message"), [
    ({"tasks": "[word_problems]"}, "choose among prepare's problems: leave them out"), ({"eval-problems": 16}, "set eval_problems lower"),
    ({"problems": "arc:x.jsonl"}, "'arc:x.jsonl' is not format:source with a format of gsm8k")])
def test_own_problems_that_cannot_work_say_what_to_do(parents, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        main(configured(parents, tmp_path / "ppo", **{"problems": f"gsm8k:{gsm8k_file(tmp_path / 'a.jsonl', 16)}"} | flags))
    assert not (tmp_path / "ppo.partial").exists()


def test_ppo_on_conversations(parents, tmp_path):
    """Rows with `prompt` in place of a question: asked as they stand, by the chat template, and given whole to reward functions."""
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add 1 and 1."},
            {"role": "assistant", "content": "The answer is 2."}]
    rows = [{"prompt": f"What is {i} + 1?", "answer": i + 1} if i % 2 else
            {"prompt": [*talk[:1 + i // 2 % 3], {"role": "user", "content": f"And {i} + 2?"}], "answer": i + 2} for i in range(16)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = "tests.rl_tiny:turns_of_prompts"
    config = configured(parents, tmp_path / "ppo", problems=f"problems:{file}", iterations=1, reward=f"{{model: 1.0, {name}: 0.5}}",
                        **{"sample-iterations": 0, "best-of": 0})
    learned, measured = own_problems(config)
    tokenizer = AutoTokenizer.from_pretrained(parents / "sft" / "model")
    texts = [tokenizer.decode(ids) for _, ids in ppo.asked([*learned, *measured], "Think.", tokenizer)]
    assert texts[:3] == ["<|system|> Be brief.<|user|> And 0 + 2?<|assistant|>", "<|user|> What is 1 + 1?<|assistant|>",
                         "<|system|> Be brief.<|user|> Add 1 and 1.<|user|> And 2 + 2?<|assistant|>"]
    PROMPTS_SEEN.clear()
    main(config)
    assert {("Be brief.", "And 6 + 2?"), ("What is 7 + 1?",), ("Be brief.", "Add 1 and 1.", "The answer is 2.", "And 4 + 2?")} <= set(
        PROMPTS_SEEN)


def test_conversations_that_end_alike_are_not_the_same(parents, tmp_path):
    rows = [{"prompt": [{"role": "system", "content": f"Be {i}."}, {"role": "user", "content": "Well?"}], "answer": 1} for i in range(8)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    learned, _ = own_problems(configured(parents, tmp_path / "ppo", problems=f"problems:{file}", **{"eval-problems": 2}))
    assert [row["prompt"][0]["content"] for row in learned] == [f"Be {i}." for i in range(1, 7)]  # 0 is held out, and 7


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["a rollout", "a checkpoint"])
def test_killed_run_continues_to_the_same_result(finished, parents, tmp_path, moment):
    """kill -9 once the second checkpoint is there, or while it is being written; then the same command again."""
    directory = tmp_path / "ppo"
    second = directory.with_name("ppo.partial") / "checkpoints" / "checkpoint-4"
    child = subprocess.Popen(command(parents, directory), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    wanted = second if moment == "a checkpoint" else second / "complete.json"
    while not wanted.exists() and child.poll() is None:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not directory.exists()
    result = run(command(parents, directory))
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stdout
    assert manifest(directory)["metrics"] == manifest(finished[0])["metrics"]
    assert (directory / "metrics.jsonl").read_text() == (finished[0] / "metrics.jsonl").read_text()
    for file in ("samples.jsonl", "overoptimization.json"):
        assert (directory / file).read_text() == (finished[0] / file).read_text()
    assert manifest(directory)["notes"] == manifest(finished[0])["notes"]
    assert (directory / "model" / "model.safetensors").read_bytes() == (finished[0] / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_two_processes_through_the_launcher(finished, parents, tmp_path):
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes/accelerate/cpu-2.yaml"))
    result = run(command(parents, tmp_path / "ppo", *launcher))
    assert result.returncode == 0, result.stderr
    one, two = ([json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (finished[0], tmp_path / "ppo"))
    for a, b in zip(one, two, strict=True):
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=2e-3, abs=2e-4), key
    one, two = (manifest(d) for d in (finished[0], tmp_path / "ppo"))
    for key, entry in one["metrics"].items():
        assert two["metrics"][key]["value"] == pytest.approx(entry["value"], rel=2e-3, abs=2e-4), key
    assert two["provenance"]["world_size"] == 2
