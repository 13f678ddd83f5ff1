"""Our checkpoints under lm-eval as they are: the same prompts, stops and greedy decoding give the same answer to every document.

lm-eval is an optional extra with an environment of its own (`make test-lm-eval`): elsewhere this is skipped.
"""
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import yaml

from prompts.answers import equal, extract
from prompts.strategies import direct, zero_shot_cot
from prompts.templates import DIRECT, WORKED, Style
from stages.data.curriculum import CUES
from stages.evals.backends import LocalModel
from stages.evals.scheduler import solve
from stages.evals.tasks import load_task
from stages.run.manifest import Manifest

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed here: make test-lm-eval")
MAX_TOKENS = {WORKED: 64, DIRECT: 12}


def lm_eval_samples(folder, model, prompts, *, stop, max_tokens):
    """What lm-eval's command line answers to these prompts, one text a document, in order."""
    (folder / "documents.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": "-"}) + "\n" for p in prompts))
    (folder / "parity.yaml").write_text(yaml.safe_dump({
        "task": "parity", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": list(stop), "do_sample": False, "max_gen_toks": max_tokens},
        "metric_list": [{"metric": "exact_match"}]}))
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--tasks", "parity",
         "--include_path", str(folder), "--device", "cpu", "--batch_size", "16", "--log_samples", "--output_path", str(folder / "out")],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (folder / "out").rglob("samples_parity_*.jsonl")
    found = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda s: s["doc_id"])
    assert [s["arguments"]["gen_args_0"]["arg_0"] for s in found] == list(prompts)  # asked as we ask
    return [s["resps"][0][0] for s in found]


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.parametrize("strategy, task, kind", [(zero_shot_cot, "word_problems", WORKED), (direct, "chained_variables", DIRECT)])
def test_greedy_zero_shot_answers_are_lm_evals_document_by_document(smoke, tmp_path, strategy, task, kind):
    problems = Manifest(smoke.path("prepare")).product("problems")
    model = Manifest(smoke.path("pretrain")).product("model")
    rows = load_task(task, problems=problems, difficulties=[1, 2], num_problems=0, seed=0).rows
    style = Style(chat=False, cues=CUES, max_tokens=MAX_TOKENS)
    prompts = [next(strategy(row, style))[0].prompt for row in rows]
    ours = solve([strategy(row, style) for row in rows], LocalModel(model, seed=0, batch_size=32), batch_size=64)
    theirs = lm_eval_samples(tmp_path, model, prompts, stop=style.stop, max_tokens=MAX_TOKENS[kind])
    assert len(theirs) == len(rows) >= 20
    assert [s.samples[0].text for s in ours] == theirs
    assert [s.answer for s in ours] == [extract(text) for text in theirs]
    right = [s.answer is not None and equal(s.answer, row["answer"]) for s, row in zip(ours, rows, strict=True)]
    print(f"{task}: {len(rows)} documents equal, {sum(right)} right")
