"""Recorded samples in a model's place: what they would have given under another strategy or stopping rule, with no model needed."""
from pathlib import Path

from prompts.records import Request, Result
from prompts.templates import Prompt
from stages.data.corpora import read_rows


class Replay:
    """Answers the request for sample i of a question with the i-th recorded sample of its id, of a Samples file.

    That file is {"id", "samples": [text | {"text", "tokens"?, "prompt_tokens"?, "finish"?}]} a line, in drawing order, such as the
    cells that an evaluation writes. Whatever the request's stage, it gets a recorded sample: for strategies that sample chains alone.
    Tokens that were not recorded count as 0. Raises ValueError for a file without samples and an id that is there twice.
    """

    def __init__(self, path: str | Path):
        self.path = path
        self.samples: dict[str, list[dict]] = {}
        for where, row in read_rows(path):
            if "id" not in row or not isinstance(row.get("samples"), list):
                raise ValueError(f"{where}: expected an id and a list of samples")
            if str(row["id"]) in self.samples:
                raise ValueError(f"{where}: id {row['id']!r} was there before")
            self.samples[str(row["id"])] = [sample if isinstance(sample, dict) else {"text": sample} for sample in row["samples"]]
        if not self.samples:
            raise ValueError(f"{path} holds no samples")

    def generate(self, requests: list[Request]) -> list[Result]:
        """Raises ValueError for a question that was not recorded, and for more samples than were, naming the id."""
        return [self._result(request) for request in requests]

    def _result(self, request: Request) -> Result:
        recorded = self.samples.get(request.question)
        if recorded is None:
            raise ValueError(f"{self.path} has no samples of problem {request.question!r}: record it first")
        if request.sample >= len(recorded):
            raise ValueError(f"{self.path} has {len(recorded)} samples of problem {request.question!r}, but number {request.sample + 1} "
                             "is asked for: ask for fewer samples, or record more")
        sample = recorded[request.sample]
        if not isinstance(sample.get("text"), str):
            raise ValueError(f"{self.path}: sample {request.sample + 1} of problem {request.question!r} has no text to replay")
        tokens = sample.get("tokens") or 0
        return Result(text=sample["text"], prompt_tokens=sample.get("prompt_tokens") or 0,
                      generated_tokens=len(tokens) if isinstance(tokens, list) else tokens,
                      finish=sample.get("finish") or ("stop" if sample.get("finished", True) else "length"))

    def score(self, context: Prompt, continuation: str) -> list[float]:
        raise ValueError(f"{self.path} holds texts, not a model: log-probabilities need one")
