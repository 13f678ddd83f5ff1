"""Subcommands of `python -m stages.evaluation`: `score`, which needs no model."""
import argparse
from pathlib import Path
from typing import Any

from prompts.answers import ANSWER_TYPES
from stages.evals import recorded
from stages.run.manifest import say, write_json


def score(arguments: list[str]) -> None:
    """Accuracy of recorded samples, by vote or of one sample, with early stopping replayed and a paired comparison."""
    parser = argparse.ArgumentParser(prog="python -m stages.evaluation score", description=score.__doc__, allow_abbrev=False)
    parser.add_argument("file", type=Path, help='{"id", "gold", "samples": [text | {"text", "tokens"?, "answer"?, "weight"?}]} a line')
    parser.add_argument("--answer-type", choices=ANSWER_TYPES, help="what an answer is; left out: told by its looks")
    parser.add_argument("--extract", choices=("last", "first"), default="last", help="which of several marked answers counts")
    parser.add_argument("--vote", choices=recorded.VOTES, default="majority", help="first: the first sample alone")
    parser.add_argument("--samples", type=int, metavar="K", help="use the first K samples of each question")
    parser.add_argument("--stop", default="none", metavar="RULE", help="beta:0.95, window:5, binomial:0.05 or none")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="a second file, paired by id")
    parser.add_argument("--out", required=True, type=Path, help="result.json to write")
    given = parser.parse_args(arguments)
    rules = recorded.Rules(answer_type=given.answer_type, extract=given.extract, vote=given.vote, samples=given.samples, stop=given.stop)
    check_files(given.file, given.compare, given.out)
    result = recorded.score(given.file, rules, other=given.compare)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.out, result)
    for line in lines(result, given.samples):
        say(line)


def check_files(file: Path, other: Path | None, out: Path) -> None:
    """Raises ValueError for samples that are no file and for a result that cannot be written or would replace samples."""
    for path in filter(None, (file, other)):
        if not path.is_file():
            raise ValueError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: give a file with a question's samples a line")
        if out.resolve() == path.resolve():
            raise ValueError(f"--out {out} would replace the samples: give the result another name")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name the file, as in {out / 'result.json'}")


def lines(result: dict[str, Any], samples: int | None) -> list[str]:
    low, high = result["wilson95"]
    said = [f"accuracy {result['accuracy']:.4f} [{low:.4f}, {high:.4f}], n {result['n']}, unparsed {result['unparsed']}, "
            f"unanswered {result['unanswered']}, ties {result['ties']}, samples used {result['samples_used_mean']:.2f} a question"]
    if result["lenient"]:
        said.append(f"lenient accuracy {result['lenient']['accuracy']:.4f}, unparsed {result['lenient']['unparsed']}")
    if result["fewer_samples"]:
        said.append(f"{result['fewer_samples']} questions have fewer than {samples} samples: all of theirs were used")
    if pair := result.get("compare"):
        low, high = pair["ci95"]  # the bootstrap has no width where no question differs
        said.append(f"minus {pair['other']}: {pair['difference']:+.4f} [{low:+.4f}, {high:+.4f}], n {pair['n']}, McNemar p "
                    f"{pair['mcnemar']['p']:.3g} ({pair['mcnemar']['only_first']} against {pair['mcnemar']['only_second']})")
        if lone := pair["only_in_first_file"] + pair["only_in_second_file"]:
            said.append(f"{lone} questions are in one of the files only and left out of the comparison")
    return said
