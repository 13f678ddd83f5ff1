"""From samples to figures: one record a problem, one summary a cell, paired comparisons. (Samples from elsewhere: recorded.py.)

Records are what `results/*.jsonl` hold, in the Samples format with more keys, so every figure recomputes from them:
{"id", "task", "question"?, "difficulty", "gold", "answer", "correct", "tie",
 "cost": {"requests", "prompt_tokens", "generated_tokens"}, of all that was asked,
 "samples": [{"text", "tokens", "prompt_tokens", "finished", "finish", "answer", "correct", "gold_score", "faults"}],
 "steps": [{"stage", "sample", "text", "tokens", "prompt_tokens", "finish", "score"?}], of what is no sample}
"""
import json
import tempfile
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prompts.intervals import share_interval, wilson
from prompts.records import Request, Solution
from reward.verifiers import gold_score, right
from stages.evals.statistics import bootstrap_mean, compare, pass_at_k, variance_split

SAMPLED = "sampled_cot"  # one chain at the temperature of self-consistency: the mean over its chains
PAIRS = (("self_consistency", "zero_shot_cot"), ("self_consistency", SAMPLED), ("zero_shot_cot", "direct"),
         ("few_shot_cot", "few_shot"))


def record(row: Mapping[str, Any], solution: Solution) -> dict:
    """What one problem's solution leaves on disk. The gold score judges each sample as the verifier does.

    `cost` sums all requests. `steps` holds those that are no sample (extraction, reviews, thoughts, valuations, scores), without their
    prompts; it is there only when there are any.
    """
    samples = []
    for result, answer in zip(solution.samples, solution.answers, strict=True):
        gold = gold_score(row, result.text, finished=result.finished)
        samples.append({"text": result.text, "tokens": result.generated_tokens, "prompt_tokens": result.prompt_tokens,
                        "finished": result.finished, "finish": result.finish, "answer": answer, "correct": right(row, answer),
                        "gold_score": round(gold.score, 6), "faults": list(gold.faults)})
    given = {id(sample) for sample in solution.samples}
    steps = [{"stage": step.asked.stage, "sample": step.asked.sample, "text": step.given.text, "tokens": step.given.generated_tokens,
              "prompt_tokens": step.given.prompt_tokens, "finish": step.given.finish,
              **({} if isinstance(step.asked, Request) else {"score": step.given.score and round(step.given.score, 4)})}
             for step in solution.trace if id(step.given) not in given]
    correct = right(row, solution.answer)
    return {"id": row["id"], "task": row["task"], "difficulty": row["difficulty"], "gold": row["answer"],
            "answer": solution.answer, "correct": correct, "tie": solution.tie, "samples": samples, "cost": vars(solution.cost),
            **({"steps": steps} if steps else {}), **{key: row[key] for key in ("answer_type", "template", "question") if key in row}}


def without_texts(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with what figures follow from alone: of 100,000 questions the texts would not fit in memory."""
    def without(part: Mapping[str, Any], text: str) -> dict[str, Any]:
        return {key: value for key, value in part.items() if key != text}

    return {**without(record, "question"), **{name: [without(part, "text") for part in record[name]]
                                              for name in ("samples", "steps") if name in record}}


def finishes(record: Mapping[str, Any]) -> list[str]:
    """How each text that was asked for a question ended, those that are no sample included."""
    return [part["finish"] for part in (*record["samples"], *record.get("steps", ()))]


def accuracy(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy, Wilson interval and n of the records' answers; a missing answer is wrong.

    What a record says of itself counts ("correct"), as equality does not judge every answer (`reward.verifiers.right`).
    """
    from stages.evals.metrics import AnswerAccuracy  # evaluate imports pipelines of all kinds: seconds that `score` does without

    verdicts = ["" if not r["answer"] else "right" if r["correct"] else "wrong" for r in records]
    with tempfile.TemporaryDirectory() as cache:
        metric = AnswerAccuracy(cache_dir=cache)
        result = metric.compute(predictions=verdicts, references=["right"] * len(records))
    assert result is not None
    return {"accuracy": result["accuracy"], "n": result["n"], "wilson95": list(result["wilson95"]),
            "unanswered": result["unparsed"]}


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of one cell. `unparsed` counts samples (`unparsed_rate` is their share of all samples), `unanswered` problems,
    `too_long` and `missing` requests of any kind."""
    samples = [sample for r in records for sample in r["samples"]]
    ends = Counter(end for r in records for end in finishes(r))
    finished = sum(sample["finished"] for sample in samples)
    in_format = sum(not sample["faults"] for sample in samples)
    golds = [sum(s["gold_score"] for s in r["samples"]) / len(r["samples"]) for r in records]
    levels = sorted({r["difficulty"] for r in records})
    unparsed = sum(sample["answer"] is None for sample in samples)
    return {**accuracy(records), "unparsed": unparsed, "unparsed_rate": unparsed / len(samples), "num_samples": len(samples),
            "ties": sum(r["tie"] for r in records), "tokens_mean": sum(r["cost"]["generated_tokens"] for r in records) / len(records),
            "prompt_tokens_mean": sum(r["cost"]["prompt_tokens"] for r in records) / len(records),
            "requests_mean": sum(r["cost"]["requests"] for r in records) / len(records),
            "finished": finished / len(samples), "finished_wilson95": list(wilson(finished, len(samples))),
            "in_format": in_format / len(samples), "too_long": ends["too_long"], "missing": ends["missing"],
            "gold_score": sum(golds) / len(golds), "gold_score_ci95": list(bootstrap_mean(golds)),
            "by_difficulty": {str(level): accuracy([r for r in records if r["difficulty"] == level]) for level in levels}}


def shares(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """For each problem the share of its samples that are right: the accuracy of one sampled chain."""
    return [sum(s["correct"] for s in r["samples"]) / len(r["samples"]) for r in records]


def equal_votes(strategy: str, records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are votes of equally many chains, so that one of them is a draw of its own. Where voting stopped early, which
    chains there are depends on what they say."""
    return strategy == "self_consistency" and len({len(r["samples"]) for r in records}) == 1


def clusters_of(records: Sequence[Mapping[str, Any]]) -> list[Hashable] | None:
    """What each record's question was generated from, where rows say so (`template`); a question without is a cluster of its own.

    None where no row says so, or all questions are of one template: figures are then for questions of that template alone.
    """
    found: list[Hashable] = [r["template"] if r.get("template") is not None else ("no template", r["id"]) for r in records]
    return found if any(r.get("template") is not None for r in records) and len(set(found)) > 1 else None


def sampled_summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same figures for one of the chains that voted, equally many a problem. Chains of one problem are not independent, so the
    interval is a bootstrap over problems; where they do not differ it has no width, and Wilson's at one trial a problem is given.

    `pass_at_k`: the chance that one of k chains is right, for k = 1, 2, 4 and so on. `variance`: how much of the spread lies between
    problems (`variance_split`), None for a single problem or chain.
    """
    right, whole = shares(records), summary(records)
    chains = [[float(s["correct"]) for s in r["samples"]] for r in records]
    num = len(chains[0])
    kept = ("n", "unparsed", "unparsed_rate", "num_samples", "finished", "finished_wilson95", "in_format", "gold_score",
            "gold_score_ci95")
    return {"accuracy": sum(right) / len(right), **{key: whole[key] for key in kept},
            "bootstrap95": list(bootstrap_mean(right) if len(set(right)) > 1 else share_interval(right)[1:]),
            "pass_at_k": {str(2**i): sum(pass_at_k(num, int(sum(c)), 2**i) for c in chains) / len(chains) for i in range(num.bit_length())},
            "variance": variance_split(chains) if num > 1 and len(chains) > 1 else None,
            "ties": 0, "tokens_mean": whole["tokens_mean"] * len(records) / whole["num_samples"]}


def comparisons(cells: Mapping[tuple[str, str, str], Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Paired comparisons over cells (model, task, strategy): strategies of one model, and PPO with SFT on one strategy.

    Each is made for every task and, as task "all", pooled over the tasks that both sides have. Questions are clustered by their
    template where rows name one.
    """
    scores: dict[tuple[str, str, str], dict[str, float]] = {}
    templates: dict[str, dict[Any, Hashable]] = {}  # by task and problem
    for (model, task, strategy), records in cells.items():
        templates[task] = {r["id"]: (task, r["template"]) for r in records if r.get("template") is not None}
        scores[model, task, strategy] = {r["id"]: float(r["correct"]) for r in records}
        if equal_votes(strategy, records):
            scores[model, task, SAMPLED] = dict(zip([r["id"] for r in records], shares(records), strict=True))
    models, tasks = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    wanted = [((model, a), (model, b)) for model in models for a, b in PAIRS]
    wanted += [(("ppo", strategy), ("sft", strategy)) for strategy in ("direct", "zero_shot_cot", SAMPLED, "self_consistency")]
    found = []
    for (model_a, a), (model_b, b) in wanted:
        both = [t for t in tasks if (model_a, t, a) in scores and (model_b, t, b) in scores]
        for label, pooled in [(t, [t]) for t in both] + ([("all", both)] if len(both) > 1 else []):
            pairs = [(scores[model_a, t, a][i], scores[model_b, t, b][i]) for t in pooled for i in scores[model_a, t, a]]
            made_of = clusters_of([{"id": (t, i), "template": templates[t].get(i)} for t in pooled for i in scores[model_a, t, a]])
            found.append({"a": f"{model_a}/{a}", "b": f"{model_b}/{b}", "task": label,
                          **compare([x for x, _ in pairs], [y for _, y in pairs], made_of)})
    return found


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """All or nothing: a file that exists is a finished cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    temporary.replace(path)
