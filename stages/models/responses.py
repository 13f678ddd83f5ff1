"""Several responses to each of many prompts, every process drawing its share."""
from collections.abc import Sequence

from transformers import PreTrainedModel

from stages.models.sampling import prompt_key, sample
from stages.models.training import gather, rank, world_size


def draw_responses(model: PreTrainedModel, prompts: Sequence[list[int]], names: Sequence[str], *, samples: int, seed: int,
                   temperature: float, max_new_tokens: int, eos_ids: Sequence[int], pad_id: int) -> list[list[list[int]]]:
    """`samples` responses a prompt as token ids, in the order of the prompts, on every process.

    `names` identify the prompts: the noise belongs to name, sample and seed, so the number of processes changes nothing.
    """
    mine = range(rank(), len(prompts), world_size())
    drawn = sample(model, [prompts[i] for i in mine for _ in range(samples)],
                   keys=[(prompt_key(names[i]), k) for i in mine for k in range(samples)], seed=seed, temperature=temperature,
                   max_new_tokens=max_new_tokens, eos_ids=eos_ids, pad_id=pad_id)
    together = dict(gather([(i, drawn[n * samples:(n + 1) * samples]) for n, i in enumerate(mine)]))
    return [together[i] for i in range(len(prompts))]


def stop_ids(model: PreTrainedModel) -> list[int]:
    """Tokens that end a response, as the model's config has them: one or several."""
    stops = model.config.eos_token_id
    return list(stops) if isinstance(stops, list) else [stops]
