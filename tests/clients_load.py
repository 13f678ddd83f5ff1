"""What other programs make of an exported folder, run by the interpreter of .venv-clients: no module of the project is imported.

    .venv-clients/bin/python tests/clients_load.py FOLDER < asked.json > answered.json

Asked: {"ids": [[...]], "text": "...", "messages": [...], "max_new_tokens": 12, "classifier": false, "ctranslate2": true}.
"""
import json
import sys
import tempfile

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

folder, asked = sys.argv[1], json.load(sys.stdin)
kind = AutoModelForSequenceClassification if asked["classifier"] else AutoModelForCausalLM
model, tokenizer = kind.from_pretrained(folder, torch_dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)
answer = {"version": transformers.__version__, "class": type(model).__name__, "text": tokenizer(asked["text"])["input_ids"],
          "chat": tokenizer.apply_chat_template(asked["messages"], add_generation_prompt=True)}
with torch.inference_mode():
    ids = torch.tensor(asked["ids"])
    answer["logits"] = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.tolist()
    if not asked["classifier"]:
        drawn = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=asked["max_new_tokens"])
        ends = model.generation_config.eos_token_id
        answer["generated"] = [row[:1 + next((i for i, t in enumerate(row) if t == ends), len(row))]
                               for row in drawn[:, ids.shape[1]:].tolist()]
if asked["ctranslate2"]:
    import ctranslate2

    with tempfile.TemporaryDirectory() as made:
        ctranslate2.converters.TransformersConverter(folder).convert(made, force=True)
        results = ctranslate2.Generator(made).generate_batch(
            [tokenizer.convert_ids_to_tokens(row) for row in asked["ids"]], max_length=asked["max_new_tokens"], sampling_topk=1,
            include_prompt_in_result=False, end_token=[tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)],
            return_end_token=True)
        answer["ctranslate2"] = [result.sequences_ids[0] for result in results]
json.dump(answer, sys.stdout)
