"""The report: every number leads back to a manifest, what is missing is said, and the page needs nothing but itself."""
import base64
import html
import json
import math
import re
from pathlib import Path

import pytest

from reward.gate import judge
from stages.report import ReportConfig
from stages.run import page
from stages.run.cited import CHANGE, GAIN, SCORE, verdict
from stages.run.manifest import MANIFEST, Manifest, hash_data
from stages.run.names import called
from tests.report_runs import STAGES, Reader, make_runs, rehash, report, tell


def test_the_page_needs_nothing_but_itself(whole):
    text = (whole / "report" / "index.html").read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert len(reader.links) > 20 and all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in reader.links)
    assert "<script" not in text and "url(" not in text and "@import" not in text
    anchors = {link[1:] for link in reader.links if link.startswith("#")}
    assert anchors == set(ReportConfig.PARENTS) and all(f'id="{anchor}"' in text for anchor in anchors)
    for link in reader.links:
        if link.startswith("data:"):
            svg = base64.b64decode(link.split(",", 1)[1]).decode()
            assert "prefers-color-scheme:dark" in svg and not re.search(r'(href|src)="(?!#)', svg)


def test_markdown_twin_says_the_same_and_its_figures_are_there(whole):
    text = (whole / "report" / "report.md").read_text()
    files = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(files) == Manifest(whole / "report").counts["figures"] == len(set(files)) >= 20
    assert all((whole / "report" / file).read_text().lstrip().startswith("<?xml") for file in files)
    assert not re.search("[\x02\x03\x04]", text)
    reader = Reader()
    reader.feed((whole / "report" / "index.html").read_text())
    shown = "".join(reader.text)
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| stage | verdict | key figure"):  # a picture there, without a header
            assert all(html.unescape(part) in shown for cell in line.strip("| ").split(" | ")
                       for part in cell.replace("\\|", "|").replace("]\\(", "](").split("<br>")), line


def follow(origin: str, home: Path):
    """The number that a mark points at: manifest.json#metrics/<key>/value or #counts/<key>; None for other files and for computed ones."""
    file, _, rest = origin.partition("#")
    if not file.endswith(MANIFEST) or not file.startswith(str(home)) or " " in rest:
        return None
    group, _, key = rest.partition("/")
    data = json.loads(Path(file).read_text())[group]
    if group != "metrics":
        for part in key.split("/"):
            data = data[int(part) if isinstance(data, list) else part]
        return data
    name, _, field = key.rpartition("/")
    return data[name][field]


def test_every_number_leads_back_to_the_manifest_that_holds_it(whole, told):
    marks = page.numbers(told)
    checked = 0
    for text, origin in marks:
        held = follow(origin, whole)
        if isinstance(held, list):
            ends = [float(part) for part in text.strip("[]").split(",")]
            scale = 100 if max(map(abs, ends)) > 2 * max(map(abs, held)) else 1
            assert ends == pytest.approx([scale * end for end in held], abs=0.051), (text, origin)
        elif isinstance(held, int | float) and not origin.endswith(("wall_s", "peak_rss_bytes")):
            shown = float(re.sub(r"[,%]| points", "", text))
            assert any(shown == pytest.approx(held * scale, rel=5e-3, abs=allowed)
                       for scale, allowed in ((1, 0.00501), (100, 0.0501))), (text, origin)
        else:
            continue
        checked += 1
    assert checked > 150 and len(marks) > 300
    assert {"1,234,567", "1,319"} <= {text for text, _ in marks}  # of prepare's sources and evaluation sets


def test_a_number_that_is_changed_in_a_manifest_changes_in_the_report(whole, told, tmp_path):
    before = dict(reversed(mark) for mark in page.numbers(told))
    home = make_runs(tmp_path / "tiny")
    data = json.loads((home / "ppo" / MANIFEST).read_text())
    data["metrics"]["gain/gold"]["value"] = 0.4567
    (home / "ppo" / MANIFEST).write_text(json.dumps(data))
    marks = page.numbers(tell(home, tmp_path))
    key = f"{home / 'ppo' / MANIFEST}#metrics/gain/gold/value"
    assert {text for text, origin in marks if origin == key} == {"+0.457"}
    assert before[key.replace(str(home), str(whole))] == "+0.210"


def test_each_figure_and_table_names_manifest_fingerprint_commit_and_seed(told):
    blocks = [told.summary, *(b for section in told.sections for b in (*section.figures, *section.tables) if section.key != "records")]
    assert len(blocks) > 35
    for block in blocks:
        line = page.source_line(block.sources)
        assert re.search(r"Source: \S+/manifest\.json.* · \w+ [0-9a-f]{12} · commit 0123456789 · seed 0", line), (block.caption, line)


def test_ppo_names_the_problems_it_was_measured_on(tmp_path, shown):
    home = make_runs(tmp_path / "tiny")
    assert "validation problems the gold score" in str(tell(home, tmp_path).sections)
    data = json.loads((home / "ppo" / MANIFEST).read_text())
    data["config"]["problems"] = "gsm8k:openai/gsm8k"
    (home / "ppo" / MANIFEST).write_text(json.dumps(data))
    assert "held-out problems of gsm8k:openai/gsm8k the gold score" in str(tell(home, tmp_path).sections)


def test_the_summary_states_the_effects(whole, told):
    lines = {page.plain(row[0]): [page.plain(cell) for cell in row[1:]] for row in told.summary.rows}
    prediction = lines["Held-out loss of the main model against the prediction"]
    low, high = (float(end) for end in re.findall(r"[\d.]+", prediction[1]))
    place = "inside" if low <= float(re.search("measured ([\\d.]+)", prediction[3])[1]) <= high else "outside"
    assert prediction[0] == "off by -1.0 %" and f"{place} the interval; written down before training" in prediction[3]
    found = {(p["a"], p["b"]): p for p in json.loads((whole / "evaluation" / "results.json").read_text())["comparisons"]}
    cot = found["sft/zero_shot_cot", "sft/direct"]
    assert lines["CoT over direct answers, word_problems"][0] == GAIN.text(cot["difference"])
    assert lines["CoT over direct answers, word_problems"][2] == "40" and "above zero" in lines["CoT over direct answers, word_problems"][3]
    assert "8 votes over one sampled chain, word_problems" in lines and "8 votes over greedy CoT, word_problems" in lines
    assert lines["Reward model: pairs of fresh SFT samples ordered right"][:3] == ["82.0 %", "[79.0, 85.0]", "3,000"]
    assert "greedy accuracy +1.0 points [-1.0, +3.0]" in lines["PPO: accuracy of sampled answers over SFT"][3]


def test_every_pair_stands_in_the_report_with_its_adjusted_p(whole, told):
    section = next(s for s in told.sections if s.key == "evaluation")
    table = next(t for t in section.tables if "Holm p" in t.header)
    found = json.loads((whole / "evaluation" / "results.json").read_text())["pairs"]
    assert len(table.rows) == len(found) == 15 and "All 15 pairs" in table.caption  # 1 of base, 10 of SFT's five, 1 + 3 of models
    rows = {(page.plain(row[0]), row[1]): [page.plain(cell) for cell in row[2:]] for row in table.rows}
    p = next(p for p in found if (p["a"], p["b"]) == ("sft/zero_shot_cot", "sft/direct"))
    assert rows["SFT: CoT - direct", "word_problems"] == [GAIN.text(p["difference"]), GAIN.between(p["ci95"]), "40", f"{p['p']:.2g}",
                                                          f"{p['p_holm']:.2g}", f"{100 * p['mde']:.1f} points"]
    assert p["p_holm"] > p["p"]
    equal = next(t for t in section.tables if "chains for them" in t.header)
    assert [[page.plain(cell) for cell in row[:5]] for row in equal.rows] == [
        ["SFT", "word_problems", name, "70.0", "1.00"] for name in ("few-shot", "CoT")]


def test_reward_hacking_is_told(told):
    section = next(section for section in told.sections if section.key == "ppo")
    text = page.plain(" ".join(section.paragraphs))
    assert "1 alarm of reward hacking was raised" in text and "of step 100, to which the run went back from step 160" in text
    assert "is beyond the peak of the fitted gold score" in text and "Best of 5 samples of the start" in text
    assert "0.910 [0.900, 0.920]" in text
    assert {"ppo/ppo-distance.svg", "ppo/ppo-best-of-n.svg"} <= {f"ppo/{figure.file.rsplit('/')[-1]}" for figure in section.figures}
    rows = [[page.plain(cell) for cell in row] for table in section.tables for row in table.rows]
    assert ["kl", "120", "3.25", "3", "too far"] in rows
    assert [row for row in rows if row[1:2] == ["question 1"]] == [
        ["0", "question 1", "answer 1 at 0", "0.500", "-", "0.100"], ["160", "question 1", "answer 1 at 160", "0.500", "-", "0.100"]]


def test_no_alarm_in_too_few_iterations_is_no_good_news(tmp_path, shown):
    home = make_runs(tmp_path / "tiny")
    data = json.loads((home / "ppo" / MANIFEST).read_text())
    for rows, said in ((4, "could be raised: they need 5 iterations"), (5, "No alarm of reward hacking was raised.")):
        data["notes"] |= {"alarms": [], "watched_iterations": rows}
        (home / "ppo" / MANIFEST).write_text(json.dumps(data))
        section = next(section for section in tell(home, tmp_path).sections if section.key == "ppo")
        assert said in " ".join(section.paragraphs)


def test_a_run_that_did_not_look_for_reward_hacking_says_nothing_of_it(tmp_path, shown):
    home = make_runs(tmp_path / "tiny")
    data = json.loads((home / "ppo" / MANIFEST).read_text())
    data["notes"], data["metrics"] = {}, {k: v for k, v in data["metrics"].items() if not k.startswith("best_of_n")}
    (home / "ppo" / MANIFEST).write_text(json.dumps(data))
    for name in ("overoptimization.json", "samples.jsonl"):
        (home / "ppo" / name).unlink()
    section = next(section for section in tell(home, tmp_path).sections if section.key == "ppo")
    assert "hacking" not in str(section) and len(section.tables) == 1 and not any("distance" in f.file for f in section.figures)


def test_sharpening_is_called_so(told):
    text = " ".join(t for section in told.sections if section.key == "ppo" for t in section.paragraphs)
    assert "may be mere sharpening" in text and "more than a sharper distribution" not in text


def test_a_simulated_annotator_is_called_simulated_wherever_preferences_appear(told):
    for key in ("preferences", "reward_model", "rejection_sampling", "ppo"):
        section = next(s for s in told.sections if s.key == key)
        assert "simulated annotator" in " ".join(section.paragraphs), key
    assert any("simulated annotator" in warning for warning in told.warnings)


def test_the_gate_s_reasons_stand_in_the_report(whole, told):
    section = next(s for s in told.sections if s.key == "reward_model")
    found = judge(json.loads((whole / "reward_model" / MANIFEST).read_text())["metrics"])
    table = next(t for t in section.tables if t.header[-1] == "verdict")
    assert [(row[0], row[-1]) for row in table.rows] == [(called("reward_model", r.name), r.level) for r in found.reasons]
    assert any(figure.file.endswith("reward-calibration.svg") for figure in section.figures)
    assert f"its verdict is {found.level}" in " ".join(section.paragraphs)


@pytest.mark.parametrize("present", [("pretrain",), ("prepare", "pretrain", "sft"), tuple(s for s in STAGES if s != "scaling")])
def test_a_missing_stage_is_left_out_and_said_so(present, tmp_path, capsys, shown):
    home = make_runs(tmp_path / "tiny", present)
    manifest = report(home)
    text = (home / "report" / "report.md").read_text()
    absent = [s for s in STAGES if s not in present]
    assert manifest.data["notes"]["missing"] == sorted(absent) and set(manifest.data["parents"]) == set(present)
    printed = capsys.readouterr().out
    for stage in absent:
        assert f"`make {stage} RECIPE=tiny` makes it" in text and f"{stage} (missing)" in text
        assert f"left out: {stage} has not been run" in printed
    assert f"{home}/ppo/manifest.json" not in text or "ppo" in present


def test_rejection_sampling_stands_beside_ppo(told):
    section = next(s for s in told.sections if s.key == "rejection_sampling")
    text = page.plain(section.paragraphs[0])
    assert "5,760 responses to 720 prompts in 2 rounds" in text and "of each prompt's 8 the best 1, 684 in all" in text
    assert "changed by +0.105 [+0.084, +0.126], for 1.01e+12 FLOPs. PPO's change is +0.210" in text
    gold = next(row for row in section.tables[0].rows if row[0] == "gold score")
    assert [page.plain(cell) for cell in gold[1:]] == ["0.800", "0.905", "+0.105", "[+0.084, +0.126]", "300", "1.010"]
    assert any(page.plain(row[0]).startswith("Rejection sampling: gold") for row in told.summary.rows)


def test_rejection_sampling_is_not_missed(tmp_path, shown):
    home = make_runs(tmp_path / "tiny")
    assert report(home).data["notes"]["missing"] == [] and "ejection sampling" not in (home / "report" / "report.md").read_text()


def test_an_unfinished_stage_is_named_as_begun(tmp_path, shown):
    home = make_runs(tmp_path / "tiny", ("pretrain",))
    (home / "sft.partial").mkdir()
    report(home)
    assert "sft has begun but not finished" in (home / "report" / "report.md").read_text()


def test_without_pretraining_there_is_no_report(tmp_path):
    home = make_runs(tmp_path / "tiny", ("prepare",))
    with pytest.raises(ValueError, match="run `make pretrain RECIPE=tiny` first"):
        report(home)


def test_missing_numbers_stay_missing(tmp_path):
    home = make_runs(tmp_path / "tiny", ("pretrain", "sft", "ppo"))
    for stage, keys in (("sft", ("after/stop_rate", "after/base_loss")), ("ppo", ("gain/greedy_accuracy", "after/kl"))):
        data = json.loads((home / stage / MANIFEST).read_text())
        for key in keys:
            del data["metrics"][key]
        (home / stage / MANIFEST).write_text(json.dumps(data))
    told = tell(home, tmp_path)
    lines = {row[0]: row for row in told.summary.rows}
    assert lines["SFT: answers end by themselves"][1:4] == ["not measured"] * 3
    assert "greedy accuracy not measured" in page.plain(lines["PPO: accuracy of sampled answers over SFT"][4])
    assert "learned from rankings by an annotator whom no manifest names" in told.sections[6].paragraphs[0]
    assert "not measured" in (tmp_path / "sft-answers.svg").read_text()


def test_a_product_is_written_as_one(tmp_path, shown):
    home = make_runs(tmp_path / "tiny", ("scaling", "pretrain"))
    law_file = home / "scaling" / "fit.json"
    fit = json.loads(law_file.read_text())
    law_file.write_text(json.dumps(fit | {"form": "product", "product": {"C": 50.0, "a": 0.3, "b": 0.25, "intervals": {}}}))
    rehash(home / "scaling")
    section = tell(home, tmp_path).sections[1]
    assert "50 / (N^0.3 D^0.25)" in page.plain(section.paragraphs[0])
    by_the_law = fit["E"] + 50 / (60_000**0.3 * 150_000**0.25)
    assert page.plain(section.tables[0].rows[0][4]) == f"{by_the_law:.4f}"


def test_the_mean_of_two_forms_is_written_as_both(tmp_path, shown):
    home = make_runs(tmp_path / "tiny", ("scaling", "pretrain"))
    law_file = home / "scaling" / "fit.json"
    fit = json.loads(law_file.read_text())
    product = {"C": 50.0, "a": 0.3, "b": 0.25, "sigma": 0.1, "intervals": {"a": [0.2, 0.4]}}
    law_file.write_text(json.dumps(fit | {"form": "mean", "product": product}))
    rehash(home / "scaling")
    section = tell(home, tmp_path).sections[1]
    text = page.plain(section.paragraphs[0])
    assert "the geometric mean of two laws, L = " in text and f" / D^{fit['beta']:.3g} and L = " in text and "50 / (N^0.3 D^0.25)" in text
    of_sum = fit["E"] + fit["A"] / 60_000**fit["alpha"] + fit["B"] / 150_000**fit["beta"]
    assert page.plain(section.tables[0].rows[0][4]) == f"{math.sqrt(of_sum * (fit['E'] + 50 / (60_000**0.3 * 150_000**0.25))):.4f}"
    assert [page.plain(row[0]) for row in section.tables[1].rows] == ["E", "A", "B", "alpha", "beta", "C", "a", "b"]


def test_a_ladder_from_before_is_told_without_what_it_did_not_write(tmp_path, shown):
    home = make_runs(tmp_path / "tiny", ("scaling",))
    data = json.loads((home / "scaling" / MANIFEST).read_text())
    del data["products"]["curves"], data["counts"]["flops_unshared"], data["metrics"]["holdout_error_4x"]
    (home / "scaling" / MANIFEST).write_text(json.dumps(data))
    section = tell(home, tmp_path).sections[1]
    assert len(section.figures) == 6 and "Budgets of one size" not in " ".join(section.paragraphs)


def test_a_prediction_made_afterwards_is_not_called_a_forecast(tmp_path, shown):
    home = make_runs(tmp_path / "tiny", ("scaling", "pretrain"))
    data = json.loads((home / "pretrain" / MANIFEST).read_text())
    data["notes"] = {}
    (home / "pretrain" / MANIFEST).write_text(json.dumps(data))
    told = tell(home, tmp_path)
    assert "not on record before this training began" in page.plain(told.summary.rows[0][4])
    assert any("a check of the law, not a forecast" in text for text in told.sections[1].paragraphs)


def test_runs_of_different_pipelines_side_by_side_are_noticed(tmp_path, shown):
    home = make_runs(tmp_path / "tiny", ("prepare", "pretrain", "sft"))
    data = json.loads((home / "pretrain" / MANIFEST).read_text())
    data["fingerprint"] = "sha256:" + "f" * 64
    data["provenance"] |= {"dirty": True, "commit": None}
    (home / "pretrain" / MANIFEST).write_text(json.dumps(data))
    warnings = tell(home, tmp_path).warnings
    assert any(w.startswith("sft was made from another pretrain") and "ffffffffffff" in w for w in warnings)
    assert any("uncommitted changes" in w and "pretrain" in w for w in warnings) and any("2 different commits" in w for w in warnings)


def test_a_finished_report_is_made_again_when_a_manifest_changes(tmp_path, capsys, shown):
    home = make_runs(tmp_path / "tiny", ("pretrain",))
    first = report(home).fingerprint
    assert report(home).fingerprint == first and "nothing it depends on has changed" in capsys.readouterr().out
    page_ = (home / "report" / "index.html").read_bytes()
    data = json.loads((home / "pretrain" / MANIFEST).read_text())
    data["provenance"]["wall_s"] = 99.0
    (home / "pretrain" / MANIFEST).write_text(json.dumps(data))
    assert report(home).fingerprint != first and (home / "report" / "index.html").read_bytes() != page_


def test_lineage_names_parents_settings_inputs_and_products(told, whole):
    table = next(t for s in told.sections if s.key == "records" for t in s.tables if t.caption.startswith("Lineage"))
    row = next(row for row in table.rows if row[0] == "evaluation")
    held = json.loads((whole / "evaluation" / MANIFEST).read_text())
    assert row[1] == held["fingerprint"][7:19] and row[3] == hash_data(held["identity"]["config"])[7:19]
    assert row[2] == ", ".join(f"{name} {of[7:19]}" for name, of in held["parents"].items()) and "ppo 70706f" in row[2]
    assert row[4] == f"task word_problems {held['inputs']['task word_problems'][7:19]}" and row[5].startswith("results ")


def test_costs_are_summed_over_the_stages_that_count_them(told):
    table = next(s for s in told.sections if s.key == "costs").tables[0]
    rows = {row[0]: [page.plain(cell) for cell in row[1:]] for row in table.rows}
    assert rows["preferences"][-1] == "3.1e+12" and rows["reward_model"][-1] == "2.2e+12" and rows["prepare"][-1] == "not measured"
    assert rows["sum"][-1] == f"{8.7e12 + 1.7e13 + 3.1e12 + 2.2e12 + 1_014_891_520_000:.3g}"


def test_text_is_escaped_and_marks_become_titles():
    assert page.marked(f"a < b & {page.number('7', 'x.json#k')}") == 'a &lt; b &amp; <span class="n" title="x.json#k">7</span>'
    assert page.marked("`make <b>`") == "<code>make &lt;b&gt;</code>"
    table = page.Table(["a|b"], [["x|y"]], "", [])
    assert "| x\\|y |" in page.table_markdown(table)


def test_numbers_are_written_as_their_form_says():
    assert SCORE.text(-0.0001) == CHANGE.text(0.0001) == "0.000"
    assert GAIN.text(0.1234) == "+12.3 points" and GAIN.between([-0.01, 0.034]) == "[-1.0, +3.4]"


def test_a_verdict_without_an_interval_does_not_repeat_the_column_beside_it():
    assert [verdict(ends) for ends in (None, (0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1))] == [
        "undecided", "above zero", "below zero", "not distinguishable from zero"]


@pytest.mark.parametrize(("stage", "metric", "name"), [
    ("pretrain", "heldout_accuracy", "held-out next-token accuracy"), ("pretrain", "heldout_loss/story", "held-out loss, story"),
    ("reward_model", "heldout_accuracy", "held-out pairs ordered right"),
    ("reward_model", "heldout_accuracy_distance_2", "held-out pairs ordered right, rank distance 2"),
    ("reward_model", "fresh_ece_fitted", "calibration error, fresh pairs, temperature fitted"),
    ("reward_model", "gain_over_tfidf", "lead over TF-IDF"),
    ("reward_model", "flip_rate_new_line", "pairs reordered by a rewrite, new line"),
    ("ppo", "gain/gold", "gold score, paired gain"), ("sft", "before/plain/worked_accuracy", "right, worked, base format, before"),
    ("evaluation", "ppo/zero_shot_cot-sft/direct/all", "PPO, CoT minus SFT, direct, all"),
    ("evaluation", "sft/word_problems/direct/finished", "SFT, word_problems, direct, ends by itself"), ("scaling", "alpha", "alpha")])
def test_metrics_are_called_by_names(stage, metric, name):
    assert called(stage, metric) == name


@pytest.mark.slow
def test_the_smoke_recipe_has_a_report_without_gaps(smoke):
    folder = smoke.path("report")
    text = (folder / "report.md").read_text()
    assert json.loads((folder / MANIFEST).read_text())["notes"]["missing"] == []
    unnamed = [f"{stage}: {key}" for stage in STAGES if stage != "scaling" for key in Manifest(smoke.path(stage)).metrics
               if called(stage, key) == key]
    assert not unnamed  # what a law's constants are called is their symbols
    gaps = [line for line in text.splitlines() if "not measured" in line and "Money and energy" not in line]
    # Tokens and FLOPs that a stage does not count, in the table of costs; kinds of pairs that do not occur, in that of the gate.
    assert all("GiB" in line or line.endswith("| warn |") for line in gaps), gaps
