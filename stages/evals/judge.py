"""The pipeline's own reward model, answering a strategy's `Score` requests."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prompts.records import Result, Score
from reward.folders import trusted
from reward.model import ENSEMBLE, load_ensemble, member_folders, normalize, score_ids
from stages.data.tokenizer import END


def reward_judge(path: str | Path, *, device: str = "cpu", batch_size: int = 256) -> Callable[[list[Score]], list[Result]]:
    """What scores responses with the reward model (or ensemble) in a folder, in standard deviations of SFT samples from their mean.

    The cost of a score is the tokens read, as `prompt_tokens`. A response that does not fit in the model's context gets no score and
    says "too_long". Responses come as text and are tokenised anew, which can split one in another way than it was sampled.
    Raises ValueError for a folder whose tokenizer has no chat template.
    """
    path = Path(path)
    tokenizer: Any = AutoTokenizer.from_pretrained(trusted(path))
    if tokenizer.chat_template is None:
        raise ValueError(f"the reward model in {path} has no chat template: it cannot read prompts and responses")
    models: list[Any] = [AutoModelForSequenceClassification.from_pretrained(trusted(folder), num_labels=1).to(device).eval()
                         for folder in member_folders(path)]
    ensemble = load_ensemble(path, models, None) if (path / ENSEMBLE).is_file() else None
    context, end = models[0].config.get_text_config().max_position_embeddings, tokenizer.get_vocab().get(END, tokenizer.eos_token_id)

    def ids(asked: Score) -> list[int]:
        if isinstance(asked.prompt, str):
            raise ValueError("the reward model reads chats: a Score needs a chat prompt")
        text = tokenizer.apply_chat_template(list(asked.prompt), tokenize=False, add_generation_prompt=True) + asked.response
        return tokenizer(text, add_special_tokens=False)["input_ids"] + ([end] if asked.ended else [])

    def judge(requests: list[Score]) -> list[Result]:
        rows = [ids(asked) for asked in requests]
        fitting = [i for i, row in enumerate(rows) if len(row) <= context]
        chosen = [rows[i] for i in fitting]
        scores = ensemble.unit(ensemble.raw(chosen)) if ensemble else normalize(models[0].config, score_ids(models[0], chosen, batch_size))
        results = [Result(text="", prompt_tokens=0, generated_tokens=0, finish="too_long")] * len(rows)
        for i, score in zip(fitting, scores, strict=True):
            results[i] = Result(text="", prompt_tokens=len(rows[i]), generated_tokens=0, finish="stop", score=score)
        return results
    return judge
