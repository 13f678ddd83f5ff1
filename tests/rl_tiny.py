"""Tiny random models, a tokenizer of letters, a trainer and parents of a stage, for the tests of stages/rl."""
import json
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from reward.model import from_language_model
from stages.data import curriculum
from stages.data.packing import PackedCollator, pack, to_dataset
from stages.data.tokenizer import END as TURN_END
from stages.data.tokenizer import EOS, train_tokenizer
from stages.models.adapters import adapter_config, save_adapter
from stages.models.ranking import RankingConfig, peft_settings
from stages.models.sizes import decoder_config
from stages.models.training import save_model
from stages.rl.adapters import CRITIC, REWARD, adapt, add_classifier
from stages.rl.models import PolicyWithCritic
from stages.rl.trainer import PpoSettings, PPOTrainer
from stages.run.manifest import hash_path, write_json

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PAD, END = 0, 1
LM_END = 2  # ends the documents of the corpus
VOCAB = len(LETTERS) + 2


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<pad>": PAD, "<end>": END} | {letter: i + 2 for i, letter in enumerate(LETTERS)}
    plain = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<end>")


def config(architecture: str = "qwen3", **changes):
    arguments = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": PAD, "eos_token_id": END,
                 "bos_token_id": None, "initializer_range": 0.2}
    return AutoConfig.for_model(architecture, **{**arguments, **changes})


def policy(seed: int = 0, **changes):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config(**changes))


def classifier(seed: int = 1, **changes):
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(config(num_labels=1, **changes))


def prompts(count: int = 10) -> list[tuple[dict, list[int]]]:
    return [({"id": f"p{i}", "answer": "1", "solutions": []}, [2 + (i * 7 + j) % 26 for j in range(2 + i % 4)]) for i in range(count)]


def corpus(count: int = 12) -> dict:
    """Packed rows of 16 tokens, documents of 3 to 7, and their collator, as arguments of a trainer."""
    random = np.random.default_rng(0)
    documents = [random.integers(3, VOCAB, 3 + i % 5).tolist() for i in range(3 * count)]
    rows = [{"input_ids": row} for row in list(pack(documents, 16, eos_id=LM_END, pad_id=PAD))[:count]]
    return {"ptx": rows, "ptx_collator": PackedCollator(eos_id=LM_END, pad_id=PAD)}


def early_letters(problems, texts, finished) -> list[float]:
    """Share of letters before m: a reward that a policy can raise quickly."""
    return [sum(letter < "m" for letter in text.split()) / max(1, len(text.split())) for text in texts]


PROMPTS_SEEN: list[tuple[str, ...]] = []


def turns_of_prompts(prompts, completions, **columns) -> list[float]:
    """Of TRL's signature: the number of turns of each prompt, which it keeps."""
    assert all(c == [{"role": "assistant", "content": c[0]["content"]}] for c in completions)
    PROMPTS_SEEN.extend(tuple(message["content"] for message in prompt) for prompt in prompts)
    return [float(len(prompt)) for prompt in prompts]


def trainer(directory: Path, *, iterations: int = 2, world: int = 1, reward=None, model=None, save_iterations: int = 1, seed: int = 0,
            learning_rate: float = 3e-3, judge=None, watch=None, arguments=None, ptx=(), ptx_collator=None, asked=None,
            **changes) -> PPOTrainer:
    from stages.rl.rewards import function_reward

    settings = PpoSettings(**{"rollout_batch": 16, "epochs": 2, "minibatches": 2, "micro_batch": 8, "critic_learning_rate": 3e-3,
                              "max_new_tokens": 8, "eos_ids": (END,), "pad_id": PAD, "seed": seed, **changes})
    model = model or PolicyWithCritic(policy(), classifier(), kl_coef=0.05)
    steps = settings.steps_per_iteration
    return PPOTrainer(
        model, TrainingArguments(**{
            "output_dir": str(directory / "checkpoints"), "use_cpu": True, "max_steps": iterations * steps, "report_to": "none",
            "per_device_train_batch_size": settings.micro_batch, "gradient_accumulation_steps": settings.accumulation(world),
            "learning_rate": learning_rate, "logging_steps": steps, "save_steps": save_iterations * steps, "disable_tqdm": True,
            "remove_unused_columns": False, "dataloader_pin_memory": False, **(arguments or {})}),
        settings, prompts=asked or prompts(), reward=reward or function_reward("tests.rl_tiny:early_letters"), tokenizer=tokenizer(),
        judge=judge, watch=watch, ptx=ptx, ptx_collator=ptx_collator)


def adapted(sft: Path | None = None, reward: Path | None = None, **changes):
    """A policy and critic as adapters on one base (of `policy()`), the peft model around it, and, from `reward`, the reward model on it."""
    base = policy(**changes) if sft is None else AutoModelForCausalLM.from_pretrained(sft, dtype=torch.float32)
    peft = adapt(base, rank=4, alpha=8, seed=0)
    where = (reward / "adapter", reward / "model") if reward else (None, None)
    critic = add_classifier(peft, CRITIC, *where, rank=4, alpha=8, seed=1)
    scorer = add_classifier(peft, REWARD, *where, rank=4, alpha=8, seed=2) if reward else None
    return PolicyWithCritic(base, critic, kl_coef=0.05), peft, scorer


def write_lora_reward(sft: Path, folder: Path, pad_id: int = PAD) -> None:
    """A reward model as `method: lora` saves it: `adapter/` on the model in `sft`, and `model/` with it merged; it has dropout."""
    settings = RankingConfig(run_dir="", method="lora", lora_rank=3, lora_alpha=6, peft={"lora_dropout": 0.5})
    torch.manual_seed(3)
    model = get_peft_model(from_language_model(sft, pad_id=pad_id, seed=3, random_head=True),
                           adapter_config(peft_settings(settings), [], tied=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, folder / "adapter", hash_path(sft))
    whole = model.merge_and_unload()
    whole.config.score_mean, whole.config.score_std = 0.1, 0.5
    whole.save_pretrained(folder / "model")


def write_parents(root: Path) -> Path:
    """Folders of prepare, sft and reward_model with a real tokenizer and random models."""
    texts = [row["text"] for row in islice(curriculum.documents(0), 300)]
    bpe = train_tokenizer(texts, vocab_size=400)
    rows = pack([bpe(text)["input_ids"] for text in texts[:12]], 128, eos_id=bpe.eos_token_id, pad_id=bpe.pad_token_id)
    rows = to_dataset(rows, 128, vocab_size=len(bpe))
    for part in ("train", "heldout"):
        rows.save_to_disk(str(root / "prepare" / "tokens" / part))
    assert bpe.eos_token == EOS
    bpe.eos_token = TURN_END
    model = decoder_config(bpe, hidden_size=32, num_layers=2, num_heads=2, context_length=160)
    model.eos_token_id = bpe.eos_token_id
    torch.manual_seed(0)
    save_model(AutoModelForCausalLM.from_config(model), bpe, root / "sft" / "model")
    model.num_labels, model.score_mean, model.score_std = 1, 0.1, 0.5
    save_model(AutoModelForSequenceClassification.from_config(model), bpe, root / "reward_model" / "model")
    (root / "prepare" / "problems").mkdir()
    for split in ("ppo", "validation"):
        lines = [json.dumps(p.as_row()) + "\n" for p in islice(curriculum.problems(0, split=split), 20)]
        (root / "prepare" / "problems" / f"{split}.jsonl").write_text("".join(lines))
    for stage, products in (("prepare", ("problems", "tokens")), ("sft", ("model",)), ("reward_model", ("model",))):
        write_json(root / stage / "manifest.json", {
            "stage": stage, "fingerprint": f"sha256:{stage}", "config": {}, "counts": {}, "metrics": {},
            "products": {product: {"path": product, "sha256": ""} for product in products}})
    return root
