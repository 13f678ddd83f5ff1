"""stages.sft on tiny random parents, in this process: what a whole run leaves behind, and one clear line for what cannot work."""
import itertools
import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages import sft
from stages.data import curriculum
from stages.data.packing import PackedCollator, pack, to_dataset
from stages.data.tokenizer import END, train_tokenizer
from stages.models import adapters, finetuning, verdict
from stages.models.heldout import heldout
from stages.models.sizes import build_decoder, decoder_config
from stages.models.training import save_model
from stages.run.checkpoint import read_metrics
from stages.run.config import build_config
from stages.run.manifest import write_json

CONTEXT = 128
QUESTIONS = [f"What is the colour of thing number {i} in the box of {name}?" for i in range(10) for name in ("Ann", "Bo", "Cy", "Dee")]


@pytest.fixture(scope="module")
def parents(tmp_path_factory) -> Path:
    """Finished runs `prepare` and `pretrain`: text in packed rows, problems, and a random model of it."""
    root = tmp_path_factory.mktemp("runs")
    texts = [row["text"] for row in itertools.islice(curriculum.documents(0), 300)]
    tokenizer = train_tokenizer([*texts, *QUESTIONS], vocab_size=400, context_length=CONTEXT)
    rows = list(pack(tokenizer(texts)["input_ids"], CONTEXT, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id))
    for name, part in (("heldout", rows[:12]), ("train", rows[12:])):
        to_dataset(part, CONTEXT, vocab_size=len(tokenizer)).save_to_disk(root / "prepare" / "tokens" / name)
    (root / "prepare" / "problems").mkdir()
    for split, file in (("train", "sft"), ("validation", "validation")):
        problems = [p.as_row() for p in itertools.islice(curriculum.problems(0, split=split), 24)]
        (root / "prepare" / "problems" / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    model = build_decoder(decoder_config(tokenizer, hidden_size=32, num_layers=2, num_heads=2, context_length=CONTEXT), seed=0)
    save_model(model, tokenizer, root / "pretrain" / "model")
    for stage, products in (("prepare", ["tokens", "problems"]), ("pretrain", ["model"])):
        write_json(root / stage / "manifest.json", {
            "stage": stage, "fingerprint": f"sha256:{stage}", "config": {}, "counts": {}, "metrics": {},
            "products": {name: {"path": name, "sha256": f"sha256:{name}"} for name in products}})
    return root


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """A file of 40 dialogues with a bad row at line 7."""
    lines = [json.dumps({"prompt": question, "completion": f"It is {('red', 'blue', 'green')[i % 3]}."})
             for i, question in enumerate(QUESTIONS)]
    lines.insert(6, json.dumps({"prompt": "What of it?", "completion": " "}))
    path = tmp_path_factory.mktemp("data") / "colours.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def configured(parents, run_dir, **changes):
    values = {"sources": [{"data": "instructions"}], "num_rows": 32, "validation_rows": 8, "max_length": CONTEXT, "batch_size": 8,
              "method": "full", "learning_rate": 1e-3, "epochs": 1.0, "forgetting_rows": 0, "probe_prompts": 0, "instruction_prompts": 0,
              "evaluations": 2, "max_new_tokens": 8}
    values["parents"] = {name: str(parents / name) for name in ("prepare", "pretrain")} | changes.pop("of", {})
    return build_config(sft.SftConfig, {"run_dir": str(run_dir), **values, **changes}, recipe="test")


SEQUENCE = {"num_rows": 48, "validation_rows": 16, "bad_rows": "drop", "order": "sequence", "epochs": 2.0}


@pytest.fixture(scope="module")
def finished(parents, colours, tmp_path_factory):
    """A run with everything on, what it printed, and the states of the base that `average` and the exams have to do with."""
    directory = tmp_path_factory.mktemp("finished") / "sft"
    config = configured(parents, directory, **SEQUENCE, sources=[{"data": str(colours)}, {"data": "instructions"}], replay_share=0.1,
                        average=0.5, forgetting_rows=12, probe_prompts=4, instruction_prompts=6, method="lora", lora_rank=4,
                        learning_rate=1e-2, evaluations=3, patience=0, keep="recommended")
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        for module in (sft, finetuning, verdict):
            patch.setattr(module, "say", said.append)
        made = sft.main(config)
    return config, made, "\n".join(said)


def test_rows_left_out_are_counted_and_listed(finished):
    _, made, said = finished
    found = [json.loads(line) for line in (made.path / "findings.jsonl").read_text().splitlines()]
    [dropped] = [row for row in found if row["dropped"]]
    assert dropped["source"] == "colours" and "colours.jsonl" in dropped["where"] and "7" in dropped["where"]
    assert "empty" in dropped["reason"] and dropped["reason"] in said
    colours = made.data["notes"]["sources"]["colours"]
    assert (colours["read"], colours["dropped"], colours["train"], colours["validation"]) == (41, 1, 24, 8)
    assert made.counts["dropped"] == 1 and made.counts["dialogues"] == 48 and made.counts["validation_dialogues"] == 16


def test_the_metrics_of_a_run(finished):
    config, made, _ = finished
    metrics = made.metrics
    for name, entry in metrics.items():
        low, high = entry.get("ci95", (entry["value"], entry["value"]))
        assert low <= entry["value"] <= high, name
    assert metrics["change/base_loss"]["value"] == pytest.approx(metrics["after/base_loss"]["value"] - metrics["before/base_loss"]["value"])
    assert metrics["after/kl_to_base"]["value"] > 0 and metrics["validation_loss"]["n"] > 16
    assert metrics["validation_gap"]["value"] == pytest.approx(metrics["validation_loss"]["value"] - metrics["training_loss"]["value"])
    for when in ("before", "after"):
        assert metrics[f"{when}/instructions"]["n"] == config.instruction_prompts
        assert metrics[f"{when}/stop_rate"]["n"] == metrics[f"{when}/format_rate"]["n"] == 2 * config.probe_prompts
        assert f"{when}/plain/worked_accuracy" in metrics and f"{when}/plain/stop_rate" not in metrics
    assert metrics["change/stop_rate"]["value"] == pytest.approx(metrics["after/stop_rate"]["value"] - metrics["before/stop_rate"]["value"])


def test_backward_transfer_recomputes_from_the_looks(finished):
    _, made, said = finished
    looks = {int(path.stem): json.loads(path.read_text()) for path in (made.path / "watch").glob("*.json")}
    metrics = made.metrics
    after_first = metrics["sequence/colours/colours"]["value"]
    assert metrics["backward_transfer"]["value"] == pytest.approx(after_first - metrics["sequence/instructions/colours"]["value"])
    assert metrics["backward_transfer"]["n"] == 2 and "backward transfer" in said
    boundary = 2 * (24 + (made.counts["replayed_documents"] + 1) // 2) // 8  # two epochs of the file's rows and half of what is replayed
    total = sum(row[0] for row in looks[boundary]["validation"]) / sum(row[2] for row in looks[boundary]["validation"])
    ends = sorted(metrics[f"sequence/colours/{name}"]["value"] for name in ("colours", "instructions"))
    assert ends[0] <= total <= ends[1]
    logged = {row["step"]: row for row in read_metrics(made.path / "metrics.jsonl")}
    assert logged[boundary]["eval/loss"] == pytest.approx(total)
    assert logged[boundary]["eval/loss_colours"] == pytest.approx(after_first)
    assert logged[made.counts["steps"]]["eval/loss_colours"] == pytest.approx(metrics["sequence/instructions/colours"]["value"])
    assert set(looks) == {step for step, row in logged.items() if "eval/loss" in row}


def test_what_a_run_says_of_its_watch(finished):
    config, made, said = finished
    notes = made.data["notes"]
    assert notes["watch"]["validation_rows"] >= 4 and notes["watch"]["base_rows"] >= 4
    assert notes["watch"]["seconds"] > 0 and notes["watch"]["share_of_training"] > 0 and "watching took" in said
    assert made.counts["kept_step"] == notes["recommended_step"] in notes["as_good_steps"]
    assert made.counts["replayed_documents"] > 0 and made.counts["trainable_parameters"] < made.counts["parameters"]
    for name in ("loss", "verdict"):
        assert (made.path / "figures" / f"{name}.png").stat().st_size > 1000
    assert sft.main(config).fingerprint == made.fingerprint  # finished: nothing is run again


def test_the_product_is_half_way_between_base_and_tuned(finished, parents):
    """The adapter on its base gives the tuned model, of which the product has half; and its figures recompute."""
    _, made, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(made.product("model"))
    product = AutoModelForCausalLM.from_pretrained(made.product("model"))
    end = tokenizer.convert_tokens_to_ids(END)
    assert product.config.eos_token_id == product.generation_config.eos_token_id == tokenizer.eos_token_id == end
    base = AutoModelForCausalLM.from_pretrained(parents / "pretrain" / "model")
    adapters.give_meaning(base, AutoTokenizer.from_pretrained(parents / "pretrain" / "model"))
    start = {name: weight.clone() for name, weight in base.state_dict().items()}
    tuned = PeftModel.from_pretrained(base, made.product("adapter_unaveraged")).merge_and_unload().state_dict()
    moved = 0.0
    for name, weight in product.state_dict().items():
        torch.testing.assert_close(weight, (tuned[name] + start[name]) / 2, rtol=1e-4, atol=1e-6)
        moved = max(moved, float((tuned[name] - start[name]).abs().max()))
    assert moved > 0.01
    collator = PackedCollator(eos_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"), pad_id=tokenizer.pad_token_id)
    rows = datasets.load_from_disk(str(parents / "prepare" / "tokens" / "heldout"))
    assert made.metrics["after/base_loss"]["value"] == pytest.approx(heldout(product, rows, collator)["heldout_loss"]["value"], rel=1e-5)
    untouched = AutoModelForCausalLM.from_pretrained(parents / "pretrain" / "model")
    assert made.metrics["before/base_loss"]["value"] == pytest.approx(heldout(untouched, rows, collator)["heldout_loss"]["value"], rel=1e-5)


@pytest.mark.parametrize("change", [{}, {"packing": True}, {"patience": 1, "learning_rate": 1.0, **SEQUENCE}, {"average": 0.5},
                                    {"adapter": "given"}],
                         ids=["plain", "packed", "a sequence that would stop early", "full and averaged", "an adapter goes on"])
def test_other_runs_finish(parents, colours, finished, tmp_path, change):
    if "order" in change:
        change = {**change, "sources": [{"data": str(colours)}, {"data": "instructions"}], "evaluations": 12}
    if "adapter" in change:
        change = {"adapter": str(finished[1].product("adapter_unaveraged")), "method": "lora"}
    made = sft.main(configured(parents, tmp_path / "sft", **change))
    model = AutoModelForCausalLM.from_pretrained(made.product("model"))
    assert made.metrics["validation_loss"]["value"] > 0 and sum(p.numel() for p in model.parameters()) == made.counts["parameters"]
    assert ("backward_transfer" in made.metrics) == ("order" in change) and "after/base_loss" not in made.metrics


@pytest.mark.parametrize(("change", "message"), [
    ({"max_length": 200}, "max_length 200 is longer than the model's context of 128 tokens: lower it"),
    ({"order": "sequence"}, "order: sequence needs two sources or more, and packing off"),
    ({"order": "sequence", "packing": True, "sources": [{"data": "instructions"}, {"data": "curriculum"}]}, "packing off"),
    ({"average": 0.0}, r"average 0\.0 must lie above 0 and at most at 1"), ({"average": 1.5}, r"average 1\.5 must lie above 0"),
    ({"replay_share": -0.1}, r"replay_share -0\.1 at 0 or above"), ({"method": "lorra"}, "unknown method 'lorra'"),
    ({"evaluations": 0}, "evaluations 0: set it to 1 or more"),
    ({"max_length": 4}, "0 training and 0 validation dialogues are left of 32: see .*/findings.jsonl"),
    ({"validation_rows": 0}, "0 validation dialogues are left"),
    ({"micro_batch_size": 3}, "do not divide into micro batches of 3"),
    ({"method": "lora", "peft": {"use_doora": True}}, "no setting 'use_doora'"),
    ({"adapter": "nowhere", "method": "lora"}, "the adapter in nowhere does not fit the base"),
    ({"adapter": "nowhere", "method": "full"}, "method full has no use for the adapter nowhere: set method: lora"),
    ({"average": 0.5, "method": "qlora"}, "a base in 4 bits has no weights")])
def test_what_cannot_work_is_one_clear_line(parents, tmp_path, change, message):
    target = tmp_path / "sft"
    target.mkdir()
    (target / "kept").write_text("earlier product")
    with pytest.raises(ValueError, match=message) as error:
        sft.main(configured(parents, target, **change))
    assert "\n" not in str(error.value)
    assert (target / "kept").read_text() == "earlier product"


def test_a_bad_row_stops_the_run_where_it_is(parents, colours, tmp_path):
    with pytest.raises(ValueError, match=r"colours\.jsonl.*7.*empty completion.*`bad_rows: drop`"):
        sft.main(configured(parents, tmp_path / "sft", sources=[{"data": str(colours)}]))


def test_an_adapter_of_another_base(parents, finished, tmp_path):
    other = tmp_path / "adapter"
    shutil.copytree(finished[1].product("adapter_unaveraged"), other)
    (other / adapters.BASE_FILE).write_text(json.dumps({"sha256": "sha256:another"}))
    with pytest.raises(ValueError, match=r"was trained on another base \(sha256:another\) than the one given \(sha256:model\)"):
        sft.main(configured(parents, tmp_path / "sft", adapter=str(other), method="lora"))


@pytest.mark.parametrize(("template", "message"), [
    ("{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}", "the model would never learn to stop"),
    ("{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}", "does not mark the assistant's turns"),
    (None, "the tokenizer has no chat template")])
def test_a_template_that_cannot_be_learned_from(parents, tmp_path, template, message):
    folder = tmp_path / "pretrain"
    shutil.copytree(parents / "pretrain", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for file in folder.rglob("*.jinja"):
        file.unlink()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "model")
    with pytest.raises(ValueError, match=message):
        sft.main(configured(parents, tmp_path / "sft", of={"pretrain": str(folder)}))
