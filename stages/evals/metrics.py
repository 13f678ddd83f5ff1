"""Answer accuracy as an `evaluate.Metric`: it gathers over processes and combines exactly."""
import datasets
import evaluate

from prompts.answers import equal, normalize
from prompts.intervals import wilson


class AnswerAccuracy(evaluate.Metric):
    """Share of predictions equal to their reference, with its Wilson interval.

    Strings on both sides; the empty prediction abstains: it is wrong and counted in `unparsed`. Give `cache_dir` (rows wait on
    disk until `compute`), and over several processes `num_process`, `process_id` and one `experiment_id`.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Accuracy of extracted answers with its 95 % Wilson interval.", citation="", inputs_description="",
            features=datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")}))

    def _compute(self, *, predictions, references):
        right = sum(equal(p, r) for p, r in zip(predictions, references, strict=True))
        n = len(references)
        unparsed = sum(not normalize(p) for p in predictions)
        return {"accuracy": right / n, "wilson95": wilson(right, n), "n": n, "unparsed": unparsed}
