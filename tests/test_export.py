"""Exports: the same logits and tokens as the product, a card and hashes that tell where it comes from, and nothing overwritten."""
import json
import shutil
import stat

import pytest
import torch

from stages import export
from stages.models.clients import load, older_config, older_tokenizer, vllm_faults
from stages.run import card
from stages.run.manifest import Manifest, hash_path


@pytest.fixture
def run(model_folder, tmp_path):
    """A finished run of `stage` around the random model, and its export."""
    def make(stage="sft", product=model_folder, **more):
        folder = tmp_path / "runs" / "r" / stage
        shutil.copytree(product, folder / "model")
        (folder / "manifest.json").write_text(json.dumps({
            "stage": stage, "recipe": "r", "fingerprint": f"sha256:{stage}", "config": {"parents": {}}, "parents": {}, "seed": 3,
            "products": {"model": {"path": "model", "sha256": hash_path(folder / "model")}}, "counts": {"parameters": 1234},
            "metrics": {"after/worked_accuracy": {"value": 0.25, "n": 40, "ci95": [0.14, 0.40]}}, "notes": {},
            "identity": {"config": {"rank": 16}},
            "provenance": {"commit": "c" * 40, "dirty": False}, **more}))
        return folder

    return make


def config(tmp_path, stage="sft", **more):
    home = tmp_path / "runs" / "r"
    return export.ExportConfig(recipe="r", stage=stage, run_dir=str(home / "export"),
                               parents={name: str(home / name) for name in export.ExportConfig.PARENTS}, **more)


def test_export_has_equal_logits_and_tokens_and_says_where_it_comes_from(run, tmp_path):
    source = run()
    manifest = export.main(config(tmp_path))
    out = tmp_path / "runs" / "r" / "export" / "sft"
    assert manifest.path == out == manifest.product("model")
    (ours, tokenizer), (theirs, reader) = load(source / "model", False), load(out, False)
    ids = torch.arange(5, 45)[None]
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    assert tokenizer("Tom has 2.")["input_ids"] == reader("Tom has 2.")["input_ids"]
    data = json.loads((out / "manifest.json").read_text())
    assert data["parents"] == {"sft": "sha256:sft"} and data["lineage"][-1]["products"] == {"model": hash_path(source / "model")}
    assert set(data["files"]) == {p.name for p in out.iterdir()} - {"manifest.json"}
    assert all(hash_path(out / name) == of["sha256"] for name, of in data["files"].items())
    written = json.loads((out / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1000.0 and written["torch_dtype"] == "float32"
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    ends = json.loads((out / "generation_config.json").read_text())
    assert ends["eos_token_id"] == tokenizer.eos_token_id and ends["top_k"] == 0 and ends["pad_token_id"] == tokenizer.pad_token_id
    for path in (out, *out.iterdir()):
        assert path.stat().st_mode & stat.S_IROTH, path
    text = (out / "README.md").read_text()
    assert "| right, worked, after | 0.25 | [0.14, 0.4] | 40 |" in text and "sha256:sft" in text and "rank: 16" in text and "c" * 12 in text
    assert str(tmp_path) not in text + json.dumps(data), "paths of this machine go nowhere"


def test_an_export_is_not_made_twice_and_overwrites_nothing(run, tmp_path, capsys):
    source = run()
    export.main(config(tmp_path))
    out = tmp_path / "runs" / "r" / "export" / "sft"
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    export.main(config(tmp_path))
    assert "is there already, of this very model" in capsys.readouterr().out
    changed = json.loads((source / "manifest.json").read_text()) | {"fingerprint": "sha256:another"}
    (source / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"holds something else.*delete it, or give another folder"):
        export.main(config(tmp_path))
    assert before == {p: p.stat().st_mtime_ns for p in out.iterdir()}
    shutil.rmtree(out)
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else"):
        export.main(config(tmp_path))
    assert (out / "thesis.txt").read_text() == "years of work"


def test_unfinished_and_damaged_stages_are_refused(run, tmp_path):
    source = run()
    (source / "manifest.json").rename(tmp_path / "kept.json")
    with pytest.raises(ValueError, match=r"no finished run in .*sft: run `make sft RECIPE=r` first"):
        export.main(config(tmp_path))
    (tmp_path / "kept.json").rename(source / "manifest.json")
    weights = bytearray((source / "model" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (source / "model" / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="damaged or was changed"):
        export.main(config(tmp_path))
    assert not (tmp_path / "runs" / "r" / "export" / "sft").exists()


def test_an_export_that_computes_something_else_is_refused(run, tmp_path, monkeypatch):
    run()
    monkeypatch.setattr(export, "older_config", lambda c: older_config(c) | {
        "rope_theta": 10000.0, "rope_parameters": c["rope_parameters"] | {"rope_theta": 10000.0}})
    with pytest.raises(ValueError, match="logits differ from the product's by"):
        export.main(config(tmp_path))
    assert not (tmp_path / "runs" / "r" / "export" / "sft").exists()


def test_a_reward_model_keeps_its_scores_and_their_unit(run, model_folder, tmp_path):
    from transformers import AutoTokenizer

    from reward.model import from_language_model, normalize, score_ids, set_normalization
    reward = from_language_model(model_folder, pad_id=0, seed=0, random_head=True)
    set_normalization(reward, [-1.0, 3.0])
    reward.save_pretrained(tmp_path / "reward")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "reward")
    run("reward_model", product=tmp_path / "reward")
    out = export.main(config(tmp_path, "reward_model")).path
    exported, _ = load(out, True)
    rows = [[7, 8, 9], [30, 31, 32, 33, 34]]
    theirs, ours = (normalize(m.config, score_ids(m, rows)) for m in (exported, reward))
    assert theirs == pytest.approx(ours, abs=1e-5)
    assert (exported.config.score_mean, exported.config.score_std) == (1.0, 2.0)
    assert not (out / "generation_config.json").exists() and "text-classification" in (out / "README.md").read_text()


def test_lineage_follows_parents_and_says_what_it_cannot_read(run, tmp_path):
    base = run("pretrain")
    tuned = run("sft", parents={"pretrain": "sha256:pretrain"}, config={"parents": {"pretrain": str(base)}})
    assert [r["stage"] for r in card.lineage(Manifest(tuned))] == ["pretrain", "sft"]
    again = json.loads((base / "manifest.json").read_text()) | {"fingerprint": "sha256:again"}
    (base / "manifest.json").write_text(json.dumps(again))
    runs = card.lineage(Manifest(tuned))
    assert runs[0] == {"stage": "pretrain", "fingerprint": "sha256:pretrain", "unknown": "it was made again since, differently"}
    assert "- pretrain: unknown, it was made again since" in "\n".join(card.data_lines(runs))
    shutil.rmtree(base)
    assert "not where it was" in card.lineage(Manifest(tuned))[0]["unknown"]


def test_a_card_shows_hostile_names_and_does_nothing_else(run, tmp_path):
    hostile = "a|b\n# Heading <script>alert(1)</script> [x](javascript:1) `c` ![i](http://x)"
    run(identity={"config": {"source": "```\n</details><script>", "url": "https://ann:hunter2@host/x"}},
        metrics={hostile: {"value": 1.0}}, notes={"sources": {hostile: {}}})
    text = (export.main(config(tmp_path, name=hostile)).path / "README.md").read_text()
    prose = text.split("````yaml")[0] + text.split("````\n")[1]
    assert "<script>" not in prose and "\n# Heading" not in text and "](javascript" not in text and "hunter2" not in text
    assert r"a\|b \# Heading" in prose  # one cell of its table, one line


def test_an_evaluation_of_another_run_is_not_cited(run, tmp_path):
    source = Manifest(run())
    folder = tmp_path / "evaluation"
    folder.mkdir()
    measured = {"sft/word_problems/direct": {"value": 0.5, "n": 9}, "sft/word_problems/direct/finished": {"value": 1.0},
                "ppo/word_problems/direct": {"value": 0.7, "n": 9}}
    for fingerprint, expected in (("sha256:sft", {"word_problems/direct": {"value": 0.5, "n": 9}}), ("sha256:other", {})):
        (folder / "manifest.json").write_text(json.dumps({"fingerprint": "e", "parents": {"sft": fingerprint}, "metrics": measured}))
        assert card.evaluation_of(source, folder) == expected


def test_configs_in_the_words_of_older_clients():
    scaled = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}, "dtype": "bfloat16"}
    assert older_config(scaled) == scaled | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
                                             "torch_dtype": "bfloat16"}
    assert older_config({"num_local_experts": 4}) == {"num_local_experts": 4, "num_experts": 4}
    with pytest.raises(ValueError, match="differ by layer"):
        older_config({"rope_parameters": {"full_attention": {"rope_type": "default"}}})
    assert older_config({"model_type": "gpt2"}) == {"model_type": "gpt2"}
    new = {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|u|>"], "eos_token": "<e>",
           "unk_token": "?"}
    assert older_tokenizer(new) == {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<|u|>"],
                                    "eos_token": "<e>", "unk_token": "?", "bos_token": "<e>"}


def test_what_vllm_would_refuse_is_named():
    sound = {"architectures": ["Qwen3ForCausalLM"], "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128, "head_dim": 16,
             "max_position_embeddings": 256, "vocab_size": 624}
    assert vllm_faults(sound, 619) == vllm_faults(sound | {"architectures": ["Qwen3ForSequenceClassification"]}, 619) == []
    for change, fault in (({"architectures": ["OwnForCausalLM"]}, "none that it serves"), ({"num_key_value_heads": 3}, "do not divide"),
                          ({"head_dim": 12}, "multiple of 8"), ({"vocab_size": 600}, "619 tokens"),
                          ({"max_position_embeddings": None}, "missing"), ({"quantization_config": {"bits": 4}}, "quantised")):
        assert fault in "; ".join(vllm_faults(sound | change, 619))
