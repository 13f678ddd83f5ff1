"""The metrics file: one line a step, whatever is measured at it and however often a run is resumed."""
from stages.run.checkpoint import MetricsLog, read_metrics


def test_what_is_measured_at_a_step_stands_in_its_line(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "train/loss": 2.0})
    log.append({"step": 2, "train/loss": 1.5})
    log.append({"step": 2, "eval/loss": 1.7})
    log.append({"step": 2, "eval/loss": 1.7})
    log.append({"step": 3, "train/loss": 1.2})
    assert read_metrics(log.path) == [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.5, "eval/loss": 1.7},
                                      {"step": 3, "train/loss": 1.2}]
    log.rewind(2)
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2]
