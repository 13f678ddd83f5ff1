"""Time and memory of a recipe's finished stages."""
import json

import pytest

from stages.run.timetable import timetable


def test_one_row_a_stage_in_order_and_their_sum(tmp_path):
    for stage, seconds, attempts in (("sft", 61, 3), ("prepare", 9, 1)):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "manifest.json").write_text(json.dumps(
            {"provenance": {"wall_s": seconds, "peak_rss_bytes": 3 << 29, "attempts": attempts}}))
    rows = [line.split() for line in timetable(tmp_path).splitlines()[2:]]
    assert rows == [["prepare", "9s", "1.50", "GiB"], [*"sft 1m01s (the last of 3 attempts) 1.50 GiB".split()], ["sum", "1m10s"]]


def test_nothing_finished_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="run make pretrain"):
        timetable(tmp_path)
