"""Answers side by side in the report: of the same questions, and only shown, whatever a model says."""
import json
import re
import shutil

from stages.run import page
from tests.report_runs import make_runs, rehash, tell


def test_text_of_models_is_only_shown(whole, told):
    """The made-up evaluation's questions and answers are hostile; neither form of the report lets them do anything."""
    page_, twin = ((whole / "report" / name).read_text() for name in ("index.html", "report.md"))
    section = next(s for s in told.sections if s.key == "samples")
    assert "<script>window.pwned" in section.tables[0].rows[0][1]  # it was there
    assert "&lt;script&gt;window.pwned" in page_ and not re.search("<script|<img src=x|onerror='w", page_)
    assert "&lt;script>window.pwned" in twin and not re.search(r"<script|<img|!\[\]\(", twin)
    assert "forged" in page_ and not any(text == "7" and origin == "forged" for text, origin in page.numbers(told))
    assert "(U+202E)" in page_ and "\u202e" not in page_ + twin


def test_the_same_questions_stand_side_by_side(whole, told):
    section = next(s for s in told.sections if s.key == "samples")
    [table] = section.tables
    assert table.header == ["question", "base", "SFT", "PPO"] and len(table.rows) == 3 and table.caption == "word_problems: CoT."
    for i, row in enumerate(table.rows):
        assert row[0].startswith(f"Question {i} ") and row[0].endswith("Right: 7")
        for model, cell in zip(("base", "sft", "ppo"), row[1:], strict=True):
            held = json.loads((whole / "evaluation" / "results" / model / "word_problems.zero_shot_cot.jsonl").read_text().splitlines()[i])
            [sample] = held["samples"]
            said = "\u2713 right" if sample["correct"] else "\u2717 wrong"
            assert page.plain(cell).endswith(f"The answer is {sample['answer']}.\n{said}, gold {sample['gold_score']:.3f}")


def test_samples_need_two_models_and_files(tmp_path, shown):
    home = make_runs(tmp_path / "tiny")
    for model in ("base", "ppo"):
        shutil.rmtree(home / "evaluation" / "results" / model)
    rehash(home / "evaluation")
    assert not [s for s in tell(home, tmp_path).sections if s.key == "samples"]
