"""The stages preferences and reward_model on a random tiny model with hand-made parents, in this process."""
import json
from types import SimpleNamespace

import datasets
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations import deepspeed

from reward import agreement, preferences
from reward.gate import judge
from reward.model import normalize, score_ids
from reward.verifiers import dense_ranks
from stages import preferences as preferences_stage
from stages import reward_model as reward_model_stage
from stages.data import corpora, curriculum
from stages.data.tokenizer import END, train_tokenizer
from stages.models import quality
from stages.models.sizes import decoder_config
from stages.rl.adapters import REWARD, adapt, add_classifier, reward_adapter
from stages.rl.costs import ranking_flops, sampling_flops
from stages.rl.rewards import Response, build_reward, scorers
from stages.run.config import build_config
from stages.run.manifest import Manifest, write_json


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """Finished runs `prepare` and `sft`: problems of three splits, and a random model that ends its turn now and then."""
    root = tmp_path_factory.mktemp("runs")
    source = {split: curriculum.problems(0, split=split, difficulties=(2,)) for split in ("preferences", "validation")}
    rows = {split: [next(it).as_row() for _ in range(48)] for split, it in source.items()}
    (root / "prepare" / "problems").mkdir(parents=True)
    for split, part in rows.items():
        (root / "prepare" / "problems" / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    tokenizer = train_tokenizer([r["question"] for r in rows["preferences"]], vocab_size=300)
    torch.manual_seed(0)
    config = decoder_config(tokenizer, hidden_size=32, num_layers=2)
    config.eos_token_id = tokenizer.convert_tokens_to_ids(END)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "sft" / "model")
    tokenizer.save_pretrained(root / "sft" / "model")
    for stage, products in (("prepare", {"problems": "problems"}), ("sft", {"model": "model"})):
        write_json(root / stage / "manifest.json", {
            "stage": stage, "fingerprint": f"sha256:{stage}", "config": {}, "counts": {}, "metrics": {},
            "products": {name: {"path": path, "sha256": f"sha256:{name}"} for name, path in products.items()}})
    return root


def configured(stage, config_class, parents, tmp_path, **values):
    where = {name: str(tmp_path / name if (tmp_path / name).exists() else parents / name) for name in config_class.PARENTS}
    return build_config(config_class, {"run_dir": str(tmp_path / stage), "parents": where, **values}, recipe="test")


def rank(parents, tmp_path, **values):
    settings = {"tasks": [], "difficulties": [], "responses_per_prompt": 4, "temperature": 1.0, "max_new_tokens": 60, "chunk_prompts": 16}
    return preferences_stage.main(configured("preferences", preferences_stage.PreferencesConfig, parents, tmp_path, **settings | values))


def train(parents, tmp_path, **values):
    settings = {"epochs": 1, "batch_size": 4, "evaluations": 1, "fresh_problems": 12, "fresh_samples": 3, "heldout_share": 0.25}
    return reward_model_stage.main(configured("reward_model", reward_model_stage.RewardModelConfig, parents, tmp_path, **settings | values))


def test_the_model_that_is_sampled_is_whole_where_zero3_divides_what_is_loaded(parents):
    """transformers divides every model that is loaded once there are TrainingArguments for ZeRO-3, and nothing would gather this one."""
    engine = type("Zero3", (), {"is_zero3": lambda self: True})()  # held here: transformers keeps a weak reference
    deepspeed.set_hf_deepspeed_config(engine)
    made = {name: Manifest(parents / name) for name in ("prepare", "sft")}
    made["preferences"] = SimpleNamespace(config={"source": None, "tasks": [], "difficulties": [], "max_new_tokens": 4})
    config = SimpleNamespace(fresh_problems=2, fresh_samples=3, fresh_temperature=1.0, seed=0)
    try:
        lm, _, groups = reward_model_stage.fresh_samples(
            config, SimpleNamespace(parents=made), AutoTokenizer.from_pretrained(parents / "sft" / "model"), [], "cpu")
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert [len(responses) for _, responses in groups] == [3, 3] and lm.get_input_embeddings().weight.ndim == 2


@pytest.fixture(scope="module")
def ranked(parents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranked")
    return folder, rank(parents, folder)


def test_records_are_simulated_ranked_by_gold_and_never_all_tied(ranked, parents):
    _, manifest = ranked
    records, _ = preferences.read(manifest.product("preferences"))
    assert len(records) == manifest.counts["prompts"] > 4
    for record in records:
        assert record["simulated"] is True and record["annotator"].startswith("simulated")
        assert len(set(record["ranks"])) > 1
        assert len({tuple(ids) for ids in record["response_ids"]}) == len(record["responses"])  # equal samples stand once
        assert sum(record["drawn"]) == 4 and record["order"] == list(range(len(record["responses"])))
        best = max(record["gold_scores"])
        assert [r == 1 for r in record["ranks"]] == [abs(g - best) < 1e-9 for g in record["gold_scores"]]
        assert record["origin"]["model"] == "sha256:model" and record["origin"]["temperature"] == 1.0
    files = sorted((manifest.path / "chunks").glob("*.json"))
    rows = [row for file in files for row in json.loads(file.read_text())]
    in_records = sum(len(ids) * times for row in rows for r in row["records"] for ids, times in zip(r["response_ids"], r["drawn"],
                                                                                                    strict=True))
    assert manifest.counts["sampled_tokens"] == sum(row["sampled_tokens"] for row in rows) >= in_records > 0
    assert manifest.counts["flops"] == sampling_flops(
        AutoConfig.from_pretrained(parents / "sft" / "model"), prompts=48, prompt_tokens=sum(row["prompt_tokens"] for row in rows),
        responses=48 * 4, tokens=manifest.counts["sampled_tokens"])
    kept = manifest.metrics["kept_share"]
    assert kept["n"] == manifest.counts["asked"] == 48 and kept["value"] + manifest.metrics["all_tie_share"]["value"] == pytest.approx(1)
    assert {"gold_mean", "sample_accuracy", "annotator_flipped_pairs"} <= set(manifest.metrics)


def test_samples_that_are_all_alike_say_nothing_of_the_error():
    rows = [{"pairs": 3, "flipped": 0, "distinct": 3, "correct": 0.0, "gold": gold} for gold in (0.1, 0.2, 0.3)]
    found = preferences_stage.measure(rows)
    assert found["sample_accuracy"] == {"value": 0.0, "n": 3} and found["distinct_responses"] == {"value": 3.0, "n": 3}
    assert found["gold_mean"]["ci95"][0] < found["gold_mean"]["value"] == pytest.approx(0.2)


def test_sampling_does_not_depend_on_the_chunks_and_stops_when_there_is_enough(parents, ranked, tmp_path):
    whole, _ = preferences.read(ranked[1].product("preferences"))
    part, _ = preferences.read(rank(parents, tmp_path, chunk_prompts=7, max_responses=12).product("preferences"))
    assert sum(len(r["responses"]) for r in part) <= 12
    assert [r["response_ids"] for r in part] == [r["response_ids"] for r in whole[:len(part)]]


def test_prompts_can_be_counted_instead_of_responses(parents, ranked, tmp_path):
    whole, _ = preferences.read(ranked[1].product("preferences"))
    few = rank(parents, tmp_path, max_prompts=3, max_responses=0)
    part, _ = preferences.read(few.product("preferences"))
    assert [r["id"] for r in part] == [r["id"] for r in whole[:3]] and few.counts["prompts"] == 3 <= few.counts["asked"] < 48


def test_errors_of_the_annotator_are_measured(parents, tmp_path):
    flipped = rank(parents, tmp_path, error_rate=0.5).metrics["annotator_flipped_pairs"]
    assert 0.2 < flipped["value"] < 0.8 and flipped["n"] > 5


def test_a_panel_of_annotators_is_measured_against_what_was_put_in(parents, ranked, tmp_path):
    biased = {"annotators": 2, "overlap": 0.8, "error_rate": 0.1, "position_bias": 0.6, "inconsistency": 0.3, "repeat_share": 0.5}
    manifest = rank(parents, tmp_path, **biased)
    records, _ = preferences.read(manifest.product("preferences"))
    assert manifest.data["notes"]["annotators"] == [
        f"simulated: gold score, error rate 0.1, position bias 0.6, inconsistency 0.3, annotator {n} of 2" for n in (1, 2)]
    for name in ("agreement_alpha", "agreement_pairs", "first_shown_preferred", "longer_preferred", "changed_when_asked_again"):
        low, high = manifest.metrics[name]["ci95"]
        assert low <= manifest.metrics[name]["value"] <= high and manifest.metrics[name]["n"] > 0
    assert manifest.metrics["first_shown_preferred"]["ci95"][0] > 0.5
    assert manifest.metrics["agreement_alpha"]["value"] < 0.9 < 1 == agreement.ranking_alpha(both_right(records)).value
    assert manifest.counts["repeated"] > 5 and manifest.counts["contradicting"] > 0
    assert manifest.counts["prompts"] < manifest.counts["rankings"] == len(records)
    assert any(r["order"] != sorted(r["order"]) for r in records) and any(r["id"].endswith(":again") for r in records)
    assert not {"agreement_alpha", "longer_preferred"} & set(ranked[1].metrics)  # one annotator without biases: as ever


def both_right(records):
    return [{**r, "ranks": dense_ranks(r["gold_scores"])} for r in records]


def test_people_s_records_are_compared_and_what_teaches_nothing_is_kept_and_counted(parents, tmp_path, capsys):
    def by(annotator, name, ranks, **more):
        return {"id": name, "prompt": f"Who is {name}?", "responses": ["Nobody.", f"{name} is a person."], "annotator": annotator,
                "simulated": False, "time": "2026-11-24T03:37:13+00:00", "order": [1, 0], "seconds": 4.2, **more,
                **({"ranks": ranks} if ranks else {})}

    rows = [by(who, name, [2, 1]) for name in ("Tom", "Ann", "Bob", "Mia") for who in ("eve", "max")]
    rows += [by("eve", "Tom", [1, 2], id="Tom again"), by("eve", "Ann", [2, 1], id="Ann again"), by("eve", "Zoe", [1, 1]),
             by("max", "Zoe", None, skipped="cannot tell")]
    path = tmp_path / "people.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    manifest = rank(parents, tmp_path, source=str(path), max_length=200)
    counts = {"asked": 12, "rankings": 10, "prompts": 4, "skipped": 1, "all_tied": 1, "repeated": 2, "duplicated": 1, "contradicting": 1}
    assert {key: manifest.counts[key] for key in counts} == counts
    assert manifest.metrics["agreement_pairs"]["value"] == 1.0 and manifest.metrics["agreement_pairs"]["n"] == 4
    assert manifest.metrics["kept_share"]["value"] == pytest.approx(10 / 12)
    printed = capsys.readouterr().out
    assert "warning: 2 rankings repeat one of the same annotator: 1 exactly, 1 contradict it" in printed
    assert "skipped by annotators: 1" in printed and "agreement_alpha: 1.000" in printed
    assert len(preferences.read(manifest.product("preferences"), skipped=True)[0]) == 11  # kept, but not trained on
    assert len(preferences.read(manifest.product("preferences"))[0]) == 10
    part = rank(parents, tmp_path, source=str(path), max_length=200, max_prompts=3)  # what was not looked at counts for nothing
    assert part.counts["flops"] == 0
    assert part.counts["asked"] == 3 and part.metrics["kept_share"]["value"] == 1.0 and part.counts["rankings"] == 3
    named = rank(parents, tmp_path, source=str(path), max_length=200, annotator="simulated: a test")  # several stay several
    assert named.data["notes"]["annotators"] == ["simulated: a test (eve)", "simulated: a test (max)"]
    assert len(preferences.read(named.product("preferences"))[0]) == 10


def test_reward_model_is_measured_normalised_and_plain(parents, ranked, tmp_path, monkeypatch):
    (tmp_path / "preferences").symlink_to(ranked[0] / "preferences")
    monkeypatch.setattr(quality, "FITTING", 5)
    manifest = train(parents, tmp_path, fresh_problems=48)
    missing = {reason.name for reason in judge(manifest.metrics).reasons if reason.low is None}
    assert missing <= {"accuracy_longer_better", "accuracy_shorter_better"}  # of so few pairs there may be none such
    assert {"fresh_ece_fitted", "gain_over_tfidf", "gain_over_min_logprob", "length_correlation", "flip_rate_boilerplate"} <= set(
        manifest.metrics)
    for name in ("heldout_accuracy", "fresh_accuracy", "baseline_min_logprob_accuracy", "baseline_length_accuracy"):
        low, high = manifest.metrics[name]["ci95"]
        assert 0 <= low <= manifest.metrics[name]["value"] <= high <= 1 and manifest.metrics[name]["n"] > 0
    assert manifest.metrics["fresh_accuracy_distance_1"]["n"] <= manifest.metrics["fresh_accuracy"]["n"]
    assert manifest.metrics["score_mean"]["value"] == pytest.approx(0, abs=1e-5)
    assert manifest.metrics["score_std"]["value"] == pytest.approx(1, abs=1e-5)
    model = AutoModelForSequenceClassification.from_pretrained(manifest.product("model"))
    assert normalize(model.config, score_ids(model, [[9, 8, 7]]))[0] != score_ids(model, [[9, 8, 7]])[0]
    assert manifest.data["notes"]["simulated_annotator"] is True
    bins = manifest.data["notes"]["reliability"]
    for name in ("heldout", "fresh"):
        n = manifest.metrics[f"{name}_accuracy"]["n"]
        assert sum(b["n"] for b in bins[name]) == n and sum(b["right"] * b["n"] for b in bins[name]) / n == pytest.approx(
            manifest.metrics[f"{name}_accuracy"]["value"])
        assert sum(abs(b["right"] - b["confidence"]) * b["n"] for b in bins[name]) / n == pytest.approx(
            manifest.metrics[f"{name}_ece"]["value"])
    assert (tmp_path / "reward_model/figures/calibration.png").is_file()


def test_accuracy_is_told_by_annotator_and_by_source(parents, ranked, tmp_path):
    records, _ = preferences.read(ranked[1].product("preferences"))
    preferences.write(tmp_path / "two.jsonl", [r | {"annotator": f"simulated: {i % 2}", "origin": {"model": f"m{i % 2}"}}
                                               for i, r in enumerate(records)])
    rank(parents, tmp_path, source=str(tmp_path / "two.jsonl"))
    metrics = train(parents, tmp_path, heldout_share=0.5).metrics
    for group, kinds in (("annotator", ("simulated: 0", "simulated: 1")), ("source", ("m0", "m1"))):
        parts = [metrics[f"heldout_accuracy/{group}={kind}"] for kind in kinds]
        assert sum(part["n"] for part in parts) == metrics["heldout_accuracy"]["n"]
        assert sum(part["n"] * part["value"] for part in parts) == pytest.approx(
            metrics["heldout_accuracy"]["n"] * metrics["heldout_accuracy"]["value"])


def test_one_criterion_a_reward_model():
    records = [{"id": str(i), "criterion": "helpful" if i % 3 else "harmless"} for i in range(6)]
    assert [r["id"] for r in reward_model_stage.by_criterion(records, "harmless")] == ["0", "3"]
    assert reward_model_stage.by_criterion(records[1:3], None) == records[1:3]
    assert reward_model_stage.by_criterion(records, "all") == records
    with pytest.raises(ValueError, match=r"several criteria \(harmless, helpful\).*set criterion"):
        reward_model_stage.by_criterion(records, None)
    with pytest.raises(ValueError, match="no ranking is by the criterion 'honest': there are harmless, helpful"):
        reward_model_stage.by_criterion(records, "honest")


def test_held_out_prompts_are_disjoint_from_training_prompts():
    records = [{"prompt_ids": [i % 20], "response_ids": [[1], [2]], "ranks": [1, 2], "id": str(i)} for i in range(50)]
    config = build_config(reward_model_stage.RewardModelConfig, {"heldout_share": 0.2}, recipe="test")
    train_part, heldout = reward_model_stage.split(records, config)
    prompts = [{tuple(r["prompt_ids"]) for r in part} for part in (train_part, heldout)]
    assert not prompts[0] & prompts[1] and len(prompts[1]) == 4 and len(train_part) + len(heldout) == 50
    shuffled = reward_model_stage.split(records[::-1], config)[1]
    assert {r["id"] for r in shuffled} == {r["id"] for r in heldout}  # the split belongs to the prompts, not to their order


def test_a_file_of_human_preferences_takes_the_place_of_samples(parents, tmp_path):
    names = ["Tom", "Ann", "Bob", "Mia", "Sam", "Eve", "Max", "Zoe"]
    rows = [{"chosen": f"\n\nHuman: {n} has 3 pens.\n\nAssistant: Yes {n}.", "rejected": f"\n\nHuman: {n} has 3 pens.\n\nAssistant: No"}
            for n in names]
    rows.append({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: " + "c " * 400})
    path = tmp_path / "hh.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    manifest = rank(parents, tmp_path, source=str(path), max_length=200)
    assert manifest.counts["prompts"] == 8 and manifest.counts["too_long"] == 1 and manifest.data["notes"]["simulated"] is False
    trained = train(parents, tmp_path, batch_size=2)
    assert "fresh_accuracy" not in trained.metrics and trained.metrics["heldout_accuracy"]["n"] == 2
    assert trained.metrics["baseline_tfidf_accuracy"]["n"] == 2  # learned from the training prompts: two would be too few to learn from
    assert trained.metrics["score_std"]["value"] == pytest.approx(1, abs=1e-5)


def test_a_hub_id_takes_the_place_of_samples_and_its_annotator_is_named(parents, tmp_path, monkeypatch):
    """Rows as trl-lib/ultrafeedback_binarized has them: pairs of dialogues that a model ranked, which is not to pass for people."""
    calls = []

    def turns(question, answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    rows = [{"chosen": turns(f"Is it {n}?", "Yes."), "rejected": turns(f"Is it {n}?", "No"), "score_chosen": 8.0, "score_rejected": 5.0}
            for n in range(6)]
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(corpora, "hub_revision", lambda source, repo_type="dataset": "abc123")
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **more: calls.append((given, more)) or rows)
    settings = {"source": "trl-lib/ultrafeedback_binarized", "annotator": "simulated: GPT-4, UltraFeedback"}
    manifest = rank(parents, tmp_path, **settings)
    assert calls == [((settings["source"], None), {"split": "train", "streaming": True, "revision": "abc123"})]
    assert manifest.data["inputs"]["source"] == "abc123"
    records, _ = preferences.read(manifest.product("preferences"))
    assert [(r["responses"], r["ranks"], r["simulated"]) for r in records] == 6 * [(["Yes.", "No"], [1, 2], True)]
    assert manifest.data["notes"] == {"annotators": ["simulated: GPT-4, UltraFeedback"], "simulated": True}
    by_nobody = rank(parents, tmp_path, source=settings["source"])  # another annotator: the run is out of date
    assert by_nobody.data["notes"] == {"annotators": ["unknown"], "simulated": False}  # who ranked pairs, their columns do not tell


@pytest.mark.parametrize(("values", "message"), [
    ({"tasks": ["riddles"]}, r"no problem .* tasks \['riddles'\].*choose from"),
    ({"error_rate": 0.6}, r"error_rate 0\.6"), ({"inconsistency": 0.1}, "set repeat_share"), ({"overlap": 1.1}, r"overlap 1\.1"),
    ({"responses_per_prompt": 1}, r"responses_per_prompt 1"),
    ({"source": "missing.jsonl"}, r"missing\.jsonl does not exist"), ({"temperature": 0.0}, r"prompts tie: raise temperature")])
def test_bad_settings_of_preferences_say_what_to_do(parents, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        rank(parents, tmp_path, **values)
    assert not (tmp_path / "preferences").exists()


@pytest.mark.parametrize(("values", "message"), [
    ({"batch_size": 5000}, "batch_size 5000"), ({"batch_size": 4, "micro_batch_size": 3}, "micro_batch_size 3"),
    ({"gradient_checkpointing": True}, "share_prompts")])
def test_bad_settings_of_the_reward_model_say_what_to_do(parents, ranked, tmp_path, values, message):
    (tmp_path / "preferences").symlink_to(ranked[0] / "preferences")
    with pytest.raises(ValueError, match=message):
        train(parents, tmp_path, **values)


def test_ids_of_another_tokenizer_are_refused(parents, ranked, tmp_path):
    records, _ = preferences.read(ranked[1].product("preferences"))
    foreign = [{**r, "response_ids": [[9999], *r["response_ids"][1:]]} for r in records]
    preferences.write(tmp_path / "foreign.parquet", foreign)
    rank(parents, tmp_path, source=str(tmp_path / "foreign.parquet"))
    with pytest.raises(ValueError, match=r"token 9999.*another tokenizer"):
        train(parents, tmp_path)


RESPONSES = [Response({"id": str(i)}, [9, 8], ids, "", True) for i, ids in enumerate([[7, 3], [12, 40, 3], [11, 3], [60, 61, 62, 3]])]


@pytest.mark.parametrize("share", ["trunk", "none"])
def test_an_ensemble_goes_from_its_stage_to_the_rewards_of_ppo(parents, ranked, tmp_path, share):
    (tmp_path / "preferences").symlink_to(ranked[0] / "preferences")
    manifest = train(parents, tmp_path, ensemble=3, ensemble_share=share, combination="mean_std", std_coef=0.5)
    folder = manifest.product("model")
    size = AutoModelForSequenceClassification.from_pretrained(folder).config.vocab_size
    assert manifest.metrics["score_mean"]["value"] == pytest.approx(0, abs=1e-5)
    assert manifest.metrics["score_std"]["value"] == pytest.approx(1, abs=1e-5)
    assert manifest.metrics["member_disagreement"]["value"] > 0 and manifest.metrics["fresh_accuracy"]["n"] > 0
    assert len(scorers({"model": 1.0}, folder)) == len(scorers({"model@min": 1.0}, folder)) == (1 if share == "trunk" else 3)
    facts = json.loads((folder / "ensemble.json").read_text())
    learned, _ = reward_model_stage.split(
        preferences.read(ranked[1].product("preferences"))[0],
        configured("reward_model", reward_model_stage.RewardModelConfig, parents, tmp_path, heldout_share=0.25))
    assert manifest.counts["flops"] == ranking_flops(
        AutoConfig.from_pretrained(parents / "sft" / "model"), learned, passes=manifest.counts["steps"] * 4 / len(learned),
        share_prompts=True, members=1 if share == "trunk" else 3) > 0
    assert len(facts["members"]) == 3 and (folder / "members/2/config.json").is_file() == (share == "none")

    def score(name):
        return build_reward({name: 1.0}, model_path=folder, vocab_size=size)(RESPONSES)

    own, mean, worst = score("model"), score("model@mean"), score("model@min")
    torch.testing.assert_close(own, score("model@mean_std"))
    assert not torch.allclose(own, mean) and not torch.allclose(worst, mean)
    if share == "trunk":  # a plain reader, such as the critic of PPO, has the mean
        plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        scores = normalize(plain.config, score_ids(plain, [r.prompt_ids + r.ids for r in RESPONSES]))
        torch.testing.assert_close(mean, torch.tensor(scores), atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="unknown combination 'max'"):
        score("model@max")


def test_members_of_their_own_continue_where_they_were_killed(parents, ranked, tmp_path, monkeypatch):
    (tmp_path / "preferences").symlink_to(ranked[0] / "preferences")
    real = reward_model_stage.fresh_samples
    monkeypatch.setattr(reward_model_stage, "fresh_samples", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(parents, tmp_path, ensemble=2)
    monkeypatch.setattr(reward_model_stage, "fresh_samples", real)
    resumed = train(parents, tmp_path, ensemble=2)
    (tmp_path / "reward_model").rename(tmp_path / "first")
    whole = train(parents, tmp_path, ensemble=2)
    assert whole.data["products"] == resumed.data["products"] and whole.metrics == resumed.metrics


def test_lora_leaves_a_plain_model(parents, ranked, tmp_path):
    (tmp_path / "preferences").symlink_to(ranked[0] / "preferences")
    manifest = train(parents, tmp_path, method="lora", optimizer="adamw", lora_rank=4, learning_rate=1e-2)
    model = AutoModelForSequenceClassification.from_pretrained(manifest.product("model"))
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in AutoModelForSequenceClassification.from_config(model.config).named_parameters()}
    assert not list(manifest.product("model").glob("adapter*")) and model.config.score_std > 0
    base = AutoModelForCausalLM.from_pretrained(parents / "sft" / "model")
    assert torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)


def test_lora_leaves_its_adapter_which_scores_alike_on_the_sft_model(parents, ranked, tmp_path):
    (tmp_path / "preferences").symlink_to(ranked[0] / "preferences")
    manifest = train(parents, tmp_path, method="lora", optimizer="adamw", lora_rank=4, learning_rate=1e-2)
    sft = parents / "sft" / "model"
    folder = reward_adapter(manifest, sft)
    assert folder == manifest.product("adapter")
    adapted = adapt(AutoModelForCausalLM.from_pretrained(sft), rank=2, alpha=4, seed=0)
    shared = add_classifier(adapted, REWARD, folder, manifest.product("model"), rank=2, alpha=4, seed=0)
    whole = AutoModelForSequenceClassification.from_pretrained(manifest.product("model"))
    rows = [[5, 6, 7], [8, 9, 10, 11], [12, 13]]
    scores = score_ids(whole, rows)
    assert max(scores) - min(scores) > 1e-3
    assert normalize(shared.config, score_ids(shared, rows)) == pytest.approx(normalize(whole.config, scores), rel=1e-3, abs=1e-4)


def test_a_reward_model_of_another_tokenizer_is_refused_token_by_token(parents, ranked, tmp_path):
    """Of equal size, so that no id is out of range: only the words differ."""
    (tmp_path / "preferences").symlink_to(ranked[0] / "preferences")
    folder = train(parents, tmp_path).product("model")
    size = AutoModelForSequenceClassification.from_pretrained(folder).config.vocab_size
    own = AutoTokenizer.from_pretrained(parents / "sft" / "model")
    build_reward({"model": 1.0}, model_path=folder, vocab_size=size, tokenizer=own)
    other = train_tokenizer(["zebras zigzag zealously"] * 50, vocab_size=len(own))
    with pytest.raises(ValueError, match=r"reads token \d+ as .*, the policy as .* tokens differ.*one tokenizer"):
        build_reward({"model": 1.0}, model_path=folder, vocab_size=size, tokenizer=other)
    with pytest.raises(ValueError, match="not an ensemble"):
        build_reward({"model@min": 1.0}, model_path=folder, vocab_size=size)
