"""AnswerAccuracy: counts, abstentions, and exact combination over processes as `evaluate` does it."""
import multiprocessing

from prompts.intervals import wilson
from stages.evals.metrics import AnswerAccuracy

PREDICTIONS = ["18", "18.0", "", "7", "(B)", "g y m", "[invalid]"]
REFERENCES = ["18", "18", "18", "8", "B", "g y m", "3"]


def test_counts(tmp_path):
    result = AnswerAccuracy(cache_dir=str(tmp_path)).compute(predictions=PREDICTIONS, references=REFERENCES)
    assert result == {"accuracy": 4 / 7, "wilson95": wilson(4, 7), "n": 7, "unparsed": 2}
    assert not list(tmp_path.rglob("*.arrow"))  # nothing is left on disk


def _share(process, folder, results):
    metric = AnswerAccuracy(cache_dir=folder, num_process=2, process_id=process, experiment_id="shared", timeout=60)
    chosen = range(process, len(PREDICTIONS), 2)  # four rows here, three there
    metric.add_batch(predictions=[PREDICTIONS[i] for i in chosen], references=[REFERENCES[i] for i in chosen])
    results.put((process, metric.compute()))


def test_two_processes_combine_exactly(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_share, args=(i, str(tmp_path), results)) for i in range(2)]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=90) for _ in workers)
    for worker in workers:
        worker.join()
    alone = AnswerAccuracy(cache_dir=str(tmp_path / "alone")).compute(predictions=PREDICTIONS, references=REFERENCES)
    assert found == {0: alone, 1: None}
