"""A tiny decoder, a tokenizer, random dialogues and a trainer that remembers, for the tests of fine-tuning."""
import gc
import itertools
import random
from types import SimpleNamespace

import torch

from stages.data import curriculum
from stages.data.tokenizer import ASSISTANT, END, SYSTEM, USER, train_tokenizer
from stages.models import finetuning
from stages.models.adapters import adapter_config
from stages.models.finetuning import DialogueCollator, FineTuner, TuningConfig
from stages.models.forgetting import Watch
from stages.models.sizes import build_decoder, decoder_config

CONTEXT, NEW = 64, (SYSTEM, USER, ASSISTANT, END)


def tiny_tokenizer():
    return train_tokenizer([d["text"] for d in itertools.islice(curriculum.documents(0), 60)], vocab_size=280, context_length=CONTEXT)


def base_of(tokenizer, *, tied=False, width=32, dtype=torch.float32):
    """A random decoder in which every matrix counts: a fresh one's attention adds nothing yet."""
    model = build_decoder(decoder_config(tokenizer, hidden_size=width, num_layers=2, num_heads=2, context_length=CONTEXT,
                                         tie_embeddings=tied), seed=0, dtype=dtype)
    shake(model, 0.15)
    return model


@torch.no_grad()
def shake(model, size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def dialogues(count, *, seed=0, low=6, high=280, longest=40):
    """Random encoded rows of mixed lengths, the first half of each without loss."""
    rng = random.Random(seed)
    rows = [[rng.randrange(low, high) for _ in range(rng.randint(2, longest))] for _ in range(count)]
    return [{"input_ids": ids, "labels": [-100] * max(1, len(ids) // 2) + ids[max(1, len(ids) // 2):], "source": "x"} for ids in rows]


def config_of(**changes):
    return TuningConfig(**{"max_length": CONTEXT, "method": "full", "lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-2, "epochs": 1.0,
                           "batch_size": 8, **changes})


class Spy(FineTuner):
    """Remembers batches and weights of each step; `dies` is the step at whose end it is killed."""

    dies = 0
    batches: list[list[int]]

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.batches, self.weights = [], {}

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.batches.append(inputs["input_ids"].flatten().tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        step = self.state.global_step
        self.weights[step] = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        if step == self.dies:
            raise KeyboardInterrupt
        super()._maybe_log_save_evaluate(*args, **kwargs)


def tune(monkeypatch, folder, tokenizer, config, *, model=None, tied=False, train=None, validation=None, dies=0, evaluations=4, **more):
    gc.freeze()  # Trainer collects garbage at the start: a quarter of a second over all that torch holds
    monkeypatch.setattr(finetuning, "FineTuner", type("Spy", (Spy,), {"dies": dies}))
    validation = validation or dialogues(12, seed=9)
    watch = Watch(folder / "watch", validation=validation, sources=[row["source"] for row in validation],
                  collator=DialogueCollator(tokenizer.pad_token_id), neutral=None, tokens=1e9)
    new = tokenizer.convert_tokens_to_ids(list(NEW))
    return finetuning.tune(model or base_of(tokenizer, tied=tied), tokenizer, config, run=SimpleNamespace(directory=folder),
                           train=train or dialogues(32), watch=watch, evaluations=evaluations,
                           peft_config=None if config.method == "full" else adapter_config(config, new, tied), **more)
