"""A saved model as programs other than transformers 5 read it: config and tokenizer in the words that all know, and what vLLM checks.

What transformers 5 writes breaks older clients: `TokenizersBackend` is unknown to them, `rope_theta` stands inside `rope_parameters` alone,
so that 4.57 silently computes with its default of 10000, and `extra_special_tokens` is a list where they expect names.
"""
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from reward.folders import trusted

Json = dict[str, Any]
CLASSIFIER = "ForSequenceClassification"
COPIED = ("*.safetensors", "*.safetensors.index.json", "tokenizer.json", "chat_template.jinja", "vocab.json", "merges.txt", "*.model")
# What vLLM serves (vllm/model_executor/models/registry.py) of what this pipeline builds or fine-tunes. It turns a
# ...ForSequenceClassification into a pooling model by itself where it knows the ...ForCausalLM.
SERVED = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM",
          "OlmoeForCausalLM", "MixtralForCausalLM", "Dots1ForCausalLM", "PhiForCausalLM", "GPTNeoXForCausalLM", "GPT2LMHeadModel",
          "GPT2ForSequenceClassification"}


def older_config(config: Json) -> Json:
    """config.json with what transformers 4 reads beside what 5 does. Raises ValueError for rotary positions that 4 cannot express."""
    found = dict(config)
    rope = config.get("rope_parameters")
    if rope:
        if not isinstance(rope.get("rope_type"), str):
            raise ValueError(f"rope_parameters {rope} differ by layer, which transformers 4 cannot read: export with rope of one kind")
        found["rope_theta"] = rope["rope_theta"]
        more = {key: value for key, value in rope.items() if key != "rope_theta"}
        found["rope_scaling"] = None if more == {"rope_type": "default"} else more
    if number := config.get("num_experts") or config.get("num_local_experts"):  # which is the name differs by architecture and release
        found |= {"num_experts": number, "num_local_experts": number}
    if "dtype" in config:
        found["torch_dtype"] = config["dtype"]
    return found


def older_tokenizer(config: Json) -> Json:
    """tokenizer_config.json under names of transformers 4; special tokens that have no role of their own are in tokenizer.json as well."""
    found = {key: value for key, value in config.items() if key != "backend"}
    if config.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := config.get("extra_special_tokens"), list):
        del found["extra_special_tokens"]
        found["additional_special_tokens"] = extra
    # Converters (ctranslate2) want these two by name. Nothing is put before a text by them, and no text is unknown to byte-level BPE.
    for role in ("bos_token", "unk_token"):
        found.setdefault(role, config.get("eos_token"))
    return found


def vllm_faults(config: Json, num_tokens: int) -> list[str]:
    """What vLLM would refuse of a config.json, as far as that can be seen without vLLM; empty when nothing is.

    Read in vLLM's source: the registry of architectures; `ModelConfig.verify_with_parallel_config` (heads), `_get_and_verify_max_len`
    (the length), and its attention backends' `supports_head_size` (FlashAttention: multiples of 8 up to 256; Triton: from 32).
    """
    faults = []
    architectures = config.get("architectures") or []
    if len(architectures) != 1 or not {architectures[0], architectures[0].replace(CLASSIFIER, "ForCausalLM")} & SERVED:
        faults.append(f"architectures {architectures} are none that it serves")
    heads = config.get("num_attention_heads") or config.get("n_head")
    width = config.get("hidden_size") or config.get("n_embd")
    groups = config.get("num_key_value_heads") or heads
    length = config.get("max_position_embeddings") or config.get("n_positions")
    if not (heads and width and groups and length):
        return [*faults, "heads, width or max_position_embeddings are missing"]
    size = config.get("head_dim") or width // heads
    if heads % groups:
        faults.append(f"{heads} heads do not divide over {groups} key-value heads")
    if size % 8 or size > 256:
        faults.append(f"heads of {size} are not a multiple of 8 up to 256")
    if num_tokens > config["vocab_size"]:
        faults.append(f"the tokenizer has {num_tokens} tokens, the embedding {config['vocab_size']}")
    if config.get("quantization_config"):
        faults.append("weights are quantised: export whole ones")
    return faults


def load(folder: Any, classifier: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A product as the pipeline itself loads it, in float32."""
    disable_progress_bar()  # of loading weights: it cuts through the stages' lines
    kind: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    model = kind.from_pretrained(trusted(folder), dtype=torch.float32, **({"num_labels": 1} if classifier else {})).eval()
    return model, AutoTokenizer.from_pretrained(trusted(folder))


@torch.inference_mode()
def difference(ours: PreTrainedModel, theirs: PreTrainedModel, rows: int = 4, length: int = 64) -> float:
    """The largest difference of two models' logits on rows of random tokens without the padding token, float32."""
    config = ours.config.get_text_config()
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    ids = torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    if config.pad_token_id is not None:
        ids[ids == config.pad_token_id] = (config.pad_token_id + 1) % config.vocab_size
    first, second = (model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits for model in (ours, theirs))
    return (first - second).abs().max().item()
