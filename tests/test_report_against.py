"""Two runs side by side: differences by hand, pairs where the problems are the same, and one page that needs nothing else."""
import json
import random
import re
from pathlib import Path

import pytest

from reward.annotate import HIDDEN
from stages.report import ReportConfig, main
from stages.run import figures, page
from stages.run.cited import Stage
from stages.run.config import build_config
from stages.run.manifest import MANIFEST, Manifest
from stages.run.story_compare import Side, difference
from stages.run.story_compare import tell as compare_sides
from tests.report_runs import Reader, make_runs, rehash, small_figure
from tests.test_evals_statistics import compare

TWIN = {"prepare": {}, "pretrain": {"learning_rate": 0.002}, "sft": {}, "preferences": {}, "reward_model": {}, "ppo": {"kl_coef": 0.2},
        "evaluation": {}}


def rewrite(folder: Path, change) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two recipes with the same data, whose pretraining and PPO were set otherwise; the second's PPO answers some problems otherwise."""
    root = tmp_path_factory.mktemp("two")
    for name in ("first", "second"):
        make_runs(root / name, ("prepare", "pretrain", "sft", "preferences", "reward_model", "ppo", "evaluation"))
    for stage, settings in TWIN.items():
        def change(data, stage=stage, settings=settings):
            data["identity"]["config"] |= settings
            if stage != "prepare":
                data["fingerprint"] = "sha256:" + "9" * 64
            if stage == "ppo":
                data["metrics"]["gain/gold"] |= {"value": 0.15, "ci95": [0.11, 0.19]}
        rewrite(root / "second" / stage, change)
    file = root / "second" / "evaluation" / "results" / "ppo" / "word_problems.zero_shot_cot.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[:12]:
        row["correct"] = False
    random.Random(0).shuffle(rows)  # the order of a file means nothing
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rehash(root / "second" / "evaluation")
    return root


def against(root: Path, other: str, monkeypatch) -> Manifest:
    monkeypatch.setenv("PLUMBLINE_RUNS", str(root))
    return main(build_config(ReportConfig, {"against": other}, recipe="first"))


@pytest.fixture
def told(two, monkeypatch):
    """The page as records."""
    made = []
    monkeypatch.setattr(figures, "plot", lambda path, lines, **options: (drawn.update({path.stem: lines}), small_figure(path)))
    monkeypatch.setattr(page, "to_html", lambda found, folder: (made.append(found), "")[1])
    drawn: dict = {}
    monkeypatch.setattr("stages.report.hash_path", lambda path: f"sha256:{random.random()}")  # never finished before
    against(two, "second", monkeypatch)
    return made[0], drawn


def section(found: page.Page, key: str) -> page.Section:
    return next(s for s in found.sections if s.key == key)


def rows_of(table: page.Table) -> list[list[str]]:
    return [[page.plain(cell) for cell in row] for row in table.rows]


def test_a_difference_has_the_interval_of_both_by_hand():
    value, ends = difference({"value": 5.0, "ci95": [2.0, 9.0]}, {"value": 1.0, "ci95": [-2.0, 5.0]})
    assert value == 4.0 and ends == (4 - (3**2 + 4**2) ** 0.5, 4 + (4**2 + 3**2) ** 0.5)
    assert difference({"value": 1.0}, {"value": 3.0, "ci95": [2, 4]}) == (-2.0, None)
    # Newcombe 1998 (independent proportions), table II, method 10, example (a): 56/70 - 48/80, to .0524 and .3339
    value, ends = difference({"value": 56 / 70, "ci95": [0.6918, 0.8772]}, {"value": 48 / 80, "ci95": [0.4905, 0.7004]})
    assert value == pytest.approx(0.2) and ends == pytest.approx((0.0524, 0.3339), abs=2e-3)


def test_key_figures_stand_beside_one_another(told):
    found, _ = told
    assert found.summary.header == ["", "first", "second", "difference", "95 % interval", "how"]
    lines = {row[0]: row[1:] for row in rows_of(found.summary)}
    gold = lines["PPO: gold score gained"]
    reach = (0.02**2 + 0.04**2) ** 0.5
    assert gold == ["+0.210 [+0.190, +0.230], n 300", "+0.150 [+0.110, +0.190], n 300", "+0.060",
                    f"[{0.06 - reach:+.3f}, {0.06 + reach:+.3f}]", "from both intervals: above zero"]
    assert not any(name.startswith("Data") for name in lines)  # the same run on both sides


def test_settings_that_differ_are_named_and_no_others(told):
    found, _ = told
    own = section(found, "settings")
    assert "The very same run on both sides: prepare." in own.paragraphs
    assert "Another run of the same settings: sft, preferences, reward_model, evaluation." in own.paragraphs
    assert rows_of(own.tables[0]) == [["pretrain", "learning_rate", "-", "0.002"], ["ppo", "kl_coef", "0.05", "0.2"]]
    assert rows_of(section(found, "verdicts").tables[0])[-2][:2] == ["ppo", "! warns: above zero; 1 alarm of reward hacking: kl"]


def test_the_same_problems_are_paired(two, told):
    found, _ = told
    table = section(found, "evaluation").tables[0]
    rows = {row[0]: row[1:] for row in rows_of(table)}
    cells = [{json.loads(line)["id"]: json.loads(line)["correct"] for line in (
        two / name / "evaluation/results/ppo/word_problems.zero_shot_cot.jsonl").read_text().splitlines()} for name in ("first", "second")]
    by_hand = compare([float(cells[0][i]) for i in cells[0]], [float(cells[1][i]) for i in cells[0]])
    low, high = by_hand["ci95"]
    assert rows["ppo, word_problems, zero_shot_cot"] == [
        f"{100 * sum(c.values()) / 40:.1f} %" for c in cells] + [
        f"{100 * by_hand['difference']:+.1f} points", f"[{100 * low:+.1f}, {100 * high:+.1f}]", "40", f"{by_hand['p']:.2g}"]
    assert rows["sft, word_problems, direct"][2] == "0.0 points"
    assert len(rows) == 7


def test_shares_differ_in_points_and_every_figure_has_words(told):
    found, _ = told
    lines = {row[0]: row[1:] for row in rows_of(found.summary)}
    assert lines["Reward model: fresh pairs ordered right"][2:4] == ["0.0 points", "[-4.2, +4.2]"]
    names = [row[0] for row in rows_of(section(found, "sft").tables[0])]
    assert "right, worked, paired change" in names and "loss, base corpus, after" in names and not any("_" in name for name in names)


def test_the_very_same_runs_leave_no_empty_table(whole, tmp_path):
    sides = [Side(name, {s: Stage(Manifest(whole / s)) for s in ReportConfig.PARENTS}) for name in ("first", "second")]
    found = compare_sides(*sides, tmp_path, paired=compare)
    assert found.summary.caption == "No key figure to compare: every stage is the very same run on both sides."
    assert "<table" not in page.table_html(found.summary) and "|" not in "".join(page.table_markdown(found.summary))
    assert all(table.rows for section in found.sections for table in section.tables)


def test_other_problems_are_not_paired(two, told, monkeypatch):
    held = (two / "second" / "evaluation" / MANIFEST).read_text()
    try:
        rewrite(two / "second" / "evaluation", lambda data: data["inputs"].update({"task word_problems": "sha256:1"}))
        made = []
        monkeypatch.setattr(page, "to_html", lambda found, folder: (made.append(found), "")[1])
        against(two, "second", monkeypatch)
    finally:
        (two / "second" / "evaluation" / MANIFEST).write_text(held)
    own = section(made[0], "evaluation")
    assert [table.caption for table in own.tables] == ["Every figure that both have measured."]
    assert any(row[1] == "input task word_problems" for row in rows_of(section(made[0], "settings").tables[0]))


def test_curves_lie_over_one_another_and_differ_without_colour(told):
    _, drawn = told
    assert {"pretrain-heldout-loss", "sft-eval-loss", "reward_model-heldout-accuracy", "ppo-objective-gold"} <= set(drawn)
    for lines in drawn.values():
        assert [(s.label, s.look, s.color) for s in lines] == [("first", "line", 0), ("second", "dashed", 1)]
    assert drawn["ppo-objective-gold"][0].x[-1] == 40  # iterations, as each side counts them


def test_the_page_needs_nothing_but_itself_and_is_not_made_twice(two, monkeypatch, capsys):
    made = against(two, "second", monkeypatch)
    assert made.path == two / "first" / "against" / "second" and not (two / "first" / "report").exists()
    text = made.product("report").read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == [] and all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in reader.links)
    assert "<script" not in text and not HIDDEN.search(text)
    twin = made.product("markdown").read_text()
    assert "# Plumbline: first against second" in twin and len(re.findall(r"!\[.*\]\((.*)\)", twin)) == made.counts["figures"] >= 8
    against(two, "second", monkeypatch)
    assert "nothing it depends on has changed" in capsys.readouterr().out
    by_folder = against(two, str(two / "second"), monkeypatch)
    assert by_folder.path == made.path
    monkeypatch.setenv("PLUMBLINE_RUNS", str(two))


def test_nothing_to_compare_with_says_what_there_is(two, monkeypatch):
    with pytest.raises(ValueError, match=r"no finished stage in .*third: give a recipe that has been run \(second\)"):
        against(two, "third", monkeypatch)
    with pytest.raises(ValueError, match="these are the same runs"):
        against(two, "first", monkeypatch)
    make_runs(two.parent / "alone", ("scaling",))
    with pytest.raises(ValueError, match="have no finished stage in common: prepare"):
        against(two, str(two.parent / "alone"), monkeypatch)
