"""The study of mixtures: arms equal in what they hold equal, runs made once, comparisons by hand. No stage runs here."""
import json
import math
import subprocess
from pathlib import Path

import pytest

from stages.data.packing import to_dataset
from stages.evals import studies, study_moe
from stages.evals.study_moe import DENSE, MAIN, arguments, arms, at, report
from stages.models.counts import count_parameters
from stages.models.pretraining import PretrainConfig
from stages.models.sizes import decoder_of
from stages.run.config import build_config
from tests.rl_tiny import END, PAD, tokenizer

COST = {"total": 8, "active": 4, "matmul": 3, "flops": 10.0, "processor_s": 1e-3, "ratio": 1.0, "ratio_low": 0.9, "ratio_high": 1.1}


@pytest.mark.parametrize("width", [64, 128])
def test_arms_are_equal_in_what_they_are_to_be(width):
    def counts(name):
        config = build_config(PretrainConfig, {"hidden_size": width, "num_heads": width // 32} | arms(width)[name], recipe="tiny")
        return count_parameters(decoder_of(config, tokenizer(), 512))

    found = {name: counts(name) for name in arms(width)}
    dense, wide = found[DENSE], found["dense, wide"]
    for name in found.keys() - {DENSE, "dense, wide", "MoE 8/1 and shared"}:
        assert found[name]["active"] - found[name]["router"] == pytest.approx(dense["active"], rel=0.01), name
        assert found[name]["total"] - found[name]["router"] == pytest.approx(wide["total"], rel=0.01), name
    shared = found["MoE 8/1 and shared"]
    assert shared["active"] == pytest.approx(dense["active"], rel=0.02)


@pytest.fixture
def prepared(tmp_path):
    rows = [[2 + (5 * i + j) % 20 for j in range(7)] + [END] + [3 + i % 5] * 5 + [END, PAD, PAD] for i in range(40)]
    to_dataset(rows, 16, vocab_size=28).save_to_disk(tmp_path / "prepare" / "train")
    tokenizer().save_pretrained(tmp_path / "prepare" / "tokenizer")
    (tmp_path / "prepare" / "manifest.json").write_text(json.dumps({"products": {
        "tokens": {"path": "."}, "tokenizer": {"path": "tokenizer"}}}))
    return tmp_path / "prepare"


def launched(monkeypatch, folder: Path, prepare: Path, *given: str) -> list[dict[str, str]]:
    calls = []

    def make(command, check):
        flags = dict(zip(command[5::2], command[6::2], strict=True))
        calls.append(flags)
        run = Path(flags["--run_dir"])
        run.mkdir(parents=True)
        tokens = int(flags["--tokens"])
        (run / "manifest.json").write_text(json.dumps({
            "metrics": {"heldout_loss": {"value": 1.0}}, "provenance": {"wall_s": 1}, "counts": {"tokens": tokens, "flops": 10 * tokens}}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(studies.subprocess, "run", make)
    study_moe.study(arguments(["--runs", str(folder), "--prepare", str(prepare), *given]))
    return calls


def test_one_line_a_run_and_the_figures(monkeypatch, tmp_path, prepared, capsys):
    monkeypatch.setattr(study_moe, "cost", lambda settings, prepare: dict.fromkeys(settings, COST))
    calls = launched(monkeypatch, tmp_path / "runs", prepared, "--seeds", "0", "1", "--tokens", "2000", "1000")
    lines = [json.loads(line) for line in (tmp_path / "runs" / "study_moe.jsonl").read_text().splitlines()]
    assert len(calls) == len(lines) == 12 and [line["tokens"] for line in lines] == [1000] * 6 + [2000] * 6
    assert {line["arm"] for line in lines} == set(MAIN) and (tmp_path / "runs" / "moe-flops.svg").is_file()
    own = {"--run_dir", "--tokens", "--seed", "--intermediate_size", "--architecture", "--num_experts"}
    alike = {key: {flags.get(key) for flags in calls} for key in set().union(*calls) - own}
    assert all(len(values) == 1 for values in alike.values()), alike
    assert "budget: 12 runs, 18,000 tokens" in capsys.readouterr().out


def test_costs_are_of_whole_steps_and_by_every_way(monkeypatch, tmp_path, prepared, capsys):
    launched(monkeypatch, tmp_path / "runs", prepared, "--cost", "--hidden-size", "32")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and "---" not in line]
    assert [row[0].strip("| ") for row in rows] == ["arm", *MAIN, "MoE 8/2, eager", "MoE 8/2, grouped_mm", "MoE 8/2, batched_mm"]
    assert rows[1][-1].startswith("1.00 (1.00 to 1.00)") and all(float(row[-2]) > 0 for row in rows[1:])


def test_comparisons_by_hand():
    """A budget of 100 and 400 tokens; the mixture costs as many FLOPs and twice the time, so at the dense model's time it has half its
    tokens: midway, in the logarithm, between its two runs."""
    assert at([(100, 3.0), (400, 1.0)], 200) == pytest.approx(2.0) and math.isnan(at([(100, 3.0), (400, 1.0)], 401))

    def line(arm, tokens, loss, seconds):
        return {"arm": arm, "seed": 0, "tokens": tokens, "flops": 10 * tokens, "cost": COST | {"processor_s": seconds},
                "figures": {"heldout_loss": loss, **({"router_max_vio": 0.5, "router_dead": 1} if arm != DENSE else {})}}

    shown = report([line(DENSE, 100, 3.0, 1.0), line(DENSE, 400, 2.0, 1.0), line("MoE 8/2", 100, 2.6, 2.0), line("MoE 8/2", 400, 1.6, 2.0)])
    assert "| dense | 4 | 8 | 1.00 | 1.00 | 2.000 |  |  |  |  |  |" in shown
    assert "| MoE 8/2 | 4 | 8 | 1.00 | 1.00 | 1.600 | -0.400 | -0.400 | 0.100 | 0.50 | 1 |" in shown
