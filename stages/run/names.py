"""Metrics of manifests by the names that people read: in the report, the comparison of two runs and the model card."""
import re

from stages.run.cited import MODELS, STRATEGIES

# By metric; where stages mean different things by one, by stage and metric. `before`, `after`, `gain` and `change` are put behind.
NAMES = {
    "prepare kept_share": "documents kept", "bytes_per_token": "bytes a token", "tokens_per_number": "tokens a number",
    "tokens_per_digit": "tokens a digit", "contamination": "evaluation questions in the training text",
    "text_entropy": "entropy of the text", "predicted_loss": "predicted loss", "holdout_error": "error on runs held out",
    "holdout_coverage": "runs held out inside the interval",
    "heldout_loss": "held-out loss", "heldout_accuracy": "held-out next-token accuracy",
    "router_max_vio": "load of the busiest expert above the mean", "router_dead": "experts never chosen",
    "validation_loss": "validation loss", "training_loss": "loss on training dialogues", "validation_gap": "gap of validation loss to it",
    "format_rate": "in format", "stop_rate": "ends by itself", "worked_accuracy": "right, worked", "direct_accuracy": "right, direct",
    "plain/worked_accuracy": "right, worked, base format", "instructions": "exact instructions", "base_loss": "loss, base corpus",
    "kl_to_base": "KL from the base on its corpus", "backward_transfer": "backward transfer",
    "preferences kept_share": "prompts with a ranking", "all_tie_share": "prompts left out: all responses tie",
    "annotator_flipped_pairs": "pairs judged against the gold score", "agreement_alpha": "agreement of annotators, Krippendorff's alpha",
    "agreement_pairs": "agreement of annotators, pairs ordered alike", "first_shown_preferred": "the first shown of two preferred",
    "longer_preferred": "the longer of two preferred", "changed_when_asked_again": "pairs changed when asked again",
    "sample_accuracy": "samples with the right answer", "gold_mean": "gold score of a sample",
    "distinct_responses": "different responses a prompt",
    "reward_model heldout_accuracy": "held-out pairs ordered right", "fresh_accuracy": "fresh pairs ordered right",
    "heldout_ece": "calibration error, held-out pairs", "fresh_ece": "calibration error, fresh pairs",
    "heldout_brier": "Brier score, held-out pairs", "fresh_brier": "Brier score, fresh pairs",
    "accuracy_shorter_better": "ordered right, the shorter is better", "accuracy_longer_better": "ordered right, the longer is better",
    "accuracy_equal_better": "ordered right, equally long", "length_correlation": "correlation of score and length",
    "score_mean": "mean score of SFT samples", "score_std": "deviation of the scores of SFT samples",
    "member_disagreement": "disagreement of the ensemble", "reward_accuracy": "own samples that the reward orders right",
    "gold": "gold score", "score": "reward (proxy)", "sampled_accuracy": "sampled accuracy", "greedy_accuracy": "greedy accuracy",
    "entropy": "entropy (nats a token)", "kl": "KL to the start (nats a response)", "length": "length (tokens)",
    "eos_rate": "ends by itself", "best_of_n": "best of n", "finished": "ends by itself", "gold_score": "gold score"}
JUDGES = {"min_logprob": "least log-probability", "length": "length", "features": "surface features", "tfidf": "TF-IDF"}
NAMES |= {f"baseline_{key}_accuracy": f"pairs ordered right by {judge}" for key, judge in JUDGES.items()}
NAMES |= {f"gain_over_{key}": f"lead over {judge}" for key, judge in JUDGES.items()}
PAIR = re.compile(r"(\w+/\w+)-(\w+/\w+)/(.+)")  # of an evaluation: one model and strategy minus another, on a task
REWRITES = {"flip_rate_": "pairs reordered by a rewrite", "score_shift_": "change of score by a rewrite",
            "score_move_": "size of the change of score by a rewrite"}
TIMES = {"before": "before", "after": "after", "gain": "paired gain", "change": "paired change"}
ENDINGS = ((r"_distance_(\d+)$", r", rank distance \1"), ("_fitted$", ", temperature fitted"), (r"_(\d+)x$", r", \1 times the compute"))


def called(stage: str, metric: str) -> str:
    """The name of a stage's metric; what has none stands as it is.

    called("sft", "after/worked_accuracy") is "right, worked, after", called("pretrain", "heldout_loss/story") "held-out loss, story".
    """
    if pair := PAIR.match(metric):
        return "{} minus {}, {}".format(*(called(stage, part) for part in pair.groups()))
    for key in (f"{stage} {metric}", metric):
        if name := NAMES.get(key) or (stage == "evaluation" and (MODELS | STRATEGIES).get(key)):
            return name
    head, _, rest = metric.partition("/")
    if rest:
        return f"{called(stage, rest)}, {TIMES[head]}" if head in TIMES else f"{called(stage, head)}, {called(stage, rest)}"
    for ending, words in ENDINGS:
        if found := re.search(ending, metric):
            return called(stage, metric[:found.start()]) + found.expand(words)
    for begin, words in REWRITES.items():
        if metric.startswith(begin):
            return f"{words}, {metric.removeprefix(begin).replace('_', ' ')}"
    return metric
