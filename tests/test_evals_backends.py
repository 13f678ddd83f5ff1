"""Backends other than the local model's text: log-probabilities, replay of recorded samples, an endpoint, the reward model as judge."""
import importlib.util
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from prompts import strategies
from prompts.records import Request, Score
from prompts.templates import BENCHMARK_CUES, DIRECT, WORKED, Style
from stages import evaluation
from stages.evals import scoring
from stages.evals.backends import LocalModel
from stages.evals.endpoint import Endpoint
from stages.evals.replay import Replay
from stages.evals.scheduler import solve

PLAIN = Style(chat=False, cues=BENCHMARK_CUES, max_tokens={WORKED: 50, DIRECT: 10})
ROWS = [{"id": i, "task": "t", "difficulty": 1, "question": f"What is {i}?", "answer": "5", "solutions": []} for i in "ab"]


def test_replay_gives_what_was_recorded_and_no_more(tmp_path):
    path = tmp_path / "samples.jsonl"
    lines = [{"id": "a", "samples": [{"text": "The answer is 4.", "tokens": 7, "prompt_tokens": 3}, "The answer is 5.", "#### 5"]},
             {"id": "b", "samples": ["The answer is 6.", {"text": "hm", "tokens": [1, 2], "finished": False}, "x"]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def replayed(n):
        return solve([strategies.self_consistency(row, PLAIN, n=n, temperature=1.0) for row in ROWS], Replay(path), batch_size=4)
    first, second = replayed(3)
    assert (first.answer, first.tokens, second.answer, second.unparsed) == ("5", 7, "6", 2)
    assert second.samples[1].finish == "length" and second.samples[1].generated_tokens == 2
    with pytest.raises(ValueError, match=r"has 3 samples of problem 'a', but number 4 is asked for"):
        replayed(4)
    with pytest.raises(ValueError, match="has no samples of problem 'c'"):
        Replay(path).generate([Request(prompt="?", question="c")])
    path.write_text(json.dumps(lines[0]) + "\n" + json.dumps(lines[0]) + "\n")
    with pytest.raises(ValueError, match="line 2: id 'a' was there before"):
        Replay(path)


def test_an_evaluations_own_cell_replays(tmp_path):
    path = tmp_path / "cell.jsonl"
    samples = ["The answer is 5.", {"text": "The answer is", "tokens": 3, "finish": "length"}]
    path.write_text(json.dumps({"id": "a", "samples": samples}) + "\n")
    [whole] = solve([strategies.self_consistency(ROWS[0], PLAIN, n=2, temperature=1.0)], Replay(path), batch_size=4)
    record = scoring.record(ROWS[0], whole)
    path.write_text(json.dumps(record) + "\n")
    [again] = solve([strategies.self_consistency(ROWS[0], PLAIN, n=2, temperature=1.0)], Replay(path), batch_size=4)
    assert again == whole


@pytest.fixture
def server():
    """An endpoint whose answers a test sets: `server.answers(path, body, number of the call) -> (status, object | bytes)`."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with web.lock:
                number = len(web.calls)
                web.calls.append((self.path, body, self.headers.get("Authorization")))
            status, said = web.answers(self.path, body, number)
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            for name, value in web.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # of 5, a busy machine loses one of 16 connections

    web = Server(("127.0.0.1", 0), Handler)
    web.calls, web.lock, web.headers = [], threading.Lock(), {}
    web.url = f"http://127.0.0.1:{web.server_port}/v1"
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield web
    web.shutdown()
    web.server_close()


def said(text, *, chat=False, reason="stop", prompt=4, completion=6):
    choice = {"finish_reason": reason, **({"message": {"content": text}} if chat else {"text": text})}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


def endpoint(server, **more):
    return Endpoint(server.url, "m", **{"seed": 1, "timeout_s": 2, "retries": 2, "wait_s": 0.01, "connections": 4, **more})


def test_endpoint_answers_plain_and_chat_in_order(server, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")

    def answers(path, body, number):
        time.sleep(0.05 if "first" in str(body) else 0)  # the later request is answered first
        chat = "chat" in path
        return said(str(body["messages"][-1]["content"] if chat else body["prompt"]), chat=chat, reason="length" if chat else "stop")
    server.answers = answers
    requests = [Request(prompt="first", question="a", stop=("\n\n",), temperature=0.5, max_tokens=9),
                Request(prompt=({"role": "user", "content": "second"},), question="a"), Request(prompt="third", question="a", sample=1)]
    results = endpoint(server).generate(requests)
    assert [(r.text, r.finish) for r in results] == [("first", "stop"), ("second", "length"), ("third", "stop")]
    assert results[0].prompt_tokens == 4 and results[0].generated_tokens == 6
    by_text = {str(body.get("prompt") or "second"): (path, body, key) for path, body, key in server.calls}
    path, body, key = by_text["first"]
    assert path == "/v1/completions" and key == "Bearer sk-secret" and by_text["second"][0] == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_tokens"], body["stop"]) == ("m", 0.5, 9, ["\n\n"])
    seeds = {text: call[1]["seed"] for text, call in by_text.items()}
    assert seeds["first"] == seeds["second"] != seeds["third"]  # one draw: (seed, task, question, stage, sample)
    before = len(server.calls)
    endpoint(server, seed=2).generate(requests[:1])
    assert server.calls[before][1]["seed"] != seeds["first"]
    assert "sk-secret" not in "".join(capfd.readouterr())


def test_endpoint_is_told_to_go_on_with_an_open_turn(server):
    server.answers = lambda path, body, number: said("on", chat=True)
    asked = {"role": "user", "content": "Hi"}
    endpoint(server).generate([Request(prompt=(asked, {"role": "assistant", "content": "Start 2."}), question="a")])
    endpoint(server).generate([Request(prompt=(asked,), question="a")])
    assert [(body.get("continue_final_message"), body.get("add_generation_prompt")) for _, body, _ in server.calls] == [
        (True, False), (None, None)]


def test_endpoint_tries_again_and_then_counts_as_missing(server):
    server.answers = lambda path, body, number: [(503, b"busy"), (200, b"{half"), said("The answer is 5.")][min(number, 2)]
    backend = endpoint(server)
    assert backend.generate([Request(prompt="?", question="a")])[0].text == "The answer is 5." and len(server.calls) == 3
    server.answers = lambda path, body, number: said("", reason="length")  # returns nothing
    [solution] = solve([strategies.direct(ROWS[0], PLAIN)], backend, batch_size=4)
    assert solution.samples[0].finish == "missing" and solution.answer is None and backend.missing == 1 and len(server.calls) == 6
    record = scoring.record(ROWS[0], solution)
    assert not record["correct"] and scoring.summary([record])["missing"] == 1


def test_endpoint_that_hangs_times_out(server):
    server.answers = lambda path, body, number: time.sleep(0.5) or said("late")
    [result] = endpoint(server, timeout_s=0.1, retries=1).generate([Request(prompt="?", question="a")])
    assert result.finish == "missing" and len(server.calls) == 2


def test_endpoint_that_is_not_there_counts_as_missing(server, capsys):
    server.shutdown()
    server.server_close()
    backend = endpoint(server, retries=0)
    assert backend.generate([Request(prompt="?", question="a")])[0].finish == "missing" and backend.missing == 1
    assert backend.generate([Request(prompt="?", question="b")])[0].finish == "missing"
    assert capsys.readouterr().out.count("refused") == 1  # said once, at the first


def test_an_endpoint_is_a_model_of_the_stage(server, stage):
    server.answers = lambda path, body, number: said("The answer is 5.", chat=True)
    where = {"url": server.url, "model": "m", "wait_s": 0.01}
    manifest = evaluation.main(stage(models={"endpoint": ["direct", "self_consistency"]}, endpoint=where, tasks=["word_problems"]))
    assert manifest.metrics["endpoint/word_problems/direct/finished"]["value"] == 1 and len(server.calls) == 7 * (1 + 3)
    with pytest.raises(ValueError, match="needs to know where it is"):
        evaluation.main(stage(models={"endpoint": ["direct"]}))
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(ValueError, match="which is not installed"):
            evaluation.main(stage(engine="vllm"))


def test_answers_of_an_endpoint_are_on_disk_before_all_are_there(server, stage, tmp_path):
    server.answers = lambda path, body, number: said("The answer is 5.", chat=True) if number < 6 else (401, {"error": "no"})
    config = stage(models={"endpoint": ["direct"]}, endpoint={"url": server.url, "model": "m", "connections": 1}, tasks=["word_problems"])
    with pytest.raises(ValueError, match="401"):
        evaluation.main(config)
    kept = [line for path in tmp_path.rglob("asked/**/*.jsonl") for line in path.read_text().splitlines()]
    assert len(kept) == 4


def test_endpoint_says_what_no_retry_can_mend(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    for answer, message in (((401, b"no"), "401 .*set OPENAI_API_KEY in the environment"), ((404, b"no model m"), "404 .*no model m"),
                            ((200, {"choices": [{"text": "x", "finish_reason": "stop"}]}), "does not say how many tokens")):
        server.answers, before = (lambda path, body, number, answer=answer: answer), len(server.calls)
        with pytest.raises(ValueError, match=message) as caught:
            endpoint(server).generate([Request(prompt="?", question="a")])
        assert len(server.calls) == before + 1 and "sk-secret" not in str(caught.value)
    server.answers = lambda path, body, number: (400, {"error": "This model's maximum context length is 64 tokens"})
    backend = endpoint(server)
    assert backend.generate([Request(prompt="?", question="a")])[0].finish == "too_long" and backend.too_long == 1
    server.answers, server.headers = (lambda path, body, number: (302, b"")), {"Location": "http://127.0.0.1:9/"}
    with pytest.raises(ValueError, match="302"):
        backend.generate([Request(prompt="?", question="a")])  # the key does not follow
    with pytest.raises(ValueError, match="not the address of an endpoint"):
        Endpoint("file:///etc/passwd", "m", seed=0)


def test_endpoint_scores_a_continuation(server):
    known = {"token_logprobs": [None, -1.0, -2.0, -3.0, -9.0], "text_offset": [0, 3, 6, 9, 12]}
    server.answers = lambda path, body, number: (200, {"choices": [{"text": "", "finish_reason": "length", "logprobs": known}]})
    assert endpoint(server).score("abcdef", "ghijkl") == [-2.0, -3.0]
    assert server.calls[0][1]["echo"] and server.calls[0][1]["prompt"] == "abcdefghijkl"
    with pytest.raises(ValueError, match="plain prompts alone"):
        endpoint(server).score(({"role": "user", "content": "x"},), "y")


def test_local_log_probabilities_are_the_models_own(model_folder):
    backend = LocalModel(model_folder, seed=0, batch_size=4)
    found = backend.score("Tom has 2.", " Tom buys 3.")
    ids = backend.encode("Tom has 2.") + backend.tokenizer(" Tom buys 3.", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logprobs = backend.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = [float(logprobs[at - 1, ids[at]]) for at in range(len(ids) - len(found), len(ids))]
    assert found == pytest.approx(wanted, abs=1e-4) and len(found) > 2
    with pytest.raises(ValueError, match="do not fit in a context of 256"):
        backend.score("Tom has 2.", " Tom" * 300)
    with pytest.raises(ValueError, match="nothing to score"):
        backend.score("Tom has 2.", "")


def test_an_open_turn_of_the_assistant_is_gone_on_with(model_folder):
    backend = LocalModel(model_folder, seed=0, batch_size=4)
    asked = ({"role": "user", "content": "Hi"},)
    whole, begun = backend.encode(asked), backend.encode((*asked, {"role": "assistant", "content": "Start 2."}))
    assert begun[:len(whole)] == whole and backend.tokenizer.decode(begun[len(whole):]) == " Start 2."  # the template's own space


def test_judge_scores_as_the_reward_model_does(model_folder, tmp_path):
    from transformers import AutoTokenizer

    from reward.model import from_language_model, normalize, score_ids
    from stages.data.tokenizer import END
    from stages.evals.judge import reward_judge

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = from_language_model(model_folder, pad_id=tokenizer.pad_token_id, seed=0, random_head=True)
    model.config.score_mean, model.config.score_std = 0.1, 0.5
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompt = ({"role": "user", "content": "How many?"},)
    asked = [Score(prompt=prompt, response=text, ended=ended, question="a") for text, ended in
             (("Start 2.", False), ("The answer is 5.", True), ("word " * 400, True))]
    results = reward_judge(tmp_path)(asked)
    text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    rows = [tokenizer(text + asked[0].response, add_special_tokens=False)["input_ids"],
            [*tokenizer(text + asked[1].response, add_special_tokens=False)["input_ids"], tokenizer.convert_tokens_to_ids(END)]]
    assert [r.score for r in results[:2]] == pytest.approx(normalize(model.config, score_ids(model, rows)), abs=1e-5)
    assert [r.prompt_tokens for r in results] == [len(rows[0]), len(rows[1]), 0] and results[2].finish == "too_long"
    assert results[2].score is None


def fake_vllm(model_folder):
    """A module in vLLM's place: it samples with transformers, by the seeds that it is given."""
    from transformers import AutoModelForCausalLM

    from stages.models.sampling import sample

    class LLM:
        def __init__(self, model, dtype, seed, enable_prefix_caching):
            self.model = AutoModelForCausalLM.from_pretrained(model)

        def generate(self, prompts, settings, use_tqdm):
            outputs = []
            for prompt, given in zip(prompts, settings, strict=True):
                ids = prompt["prompt_token_ids"]
                if given.more.get("prompt_logprobs") is not None:
                    logprobs = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
                    known = [None] + [{ids[at]: SimpleNamespace(logprob=float(logprobs[at - 1, ids[at]]))} for at in range(1, len(ids))]
                    outputs.append(SimpleNamespace(prompt_logprobs=known))
                    continue
                [drawn] = sample(self.model, [ids], keys=[(given.more["seed"], 0)], seed=0, temperature=given.more["temperature"], pad_id=0,
                                 max_new_tokens=given.more["max_tokens"], eos_ids=given.more["stop_token_ids"])
                outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(drawn))]))
            return outputs

    return SimpleNamespace(LLM=LLM, SamplingParams=lambda **more: SimpleNamespace(more=more), __spec__=SimpleNamespace())


def test_vllm_is_asked_for_the_same_and_says_when_it_is_not_there(model_folder, monkeypatch):
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(ValueError, match="vllm, which is not installed: pip install"):
            LocalModel(model_folder, seed=0, batch_size=4, engine="vllm")
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm(model_folder))
    own, theirs = (LocalModel(model_folder, seed=0, batch_size=4, engine=engine) for engine in ("transformers", "vllm"))
    greedy = [Request(prompt="Tom has 2.", question="a", max_tokens=9, stop=("\n\n",)), Request(prompt="Ann", question="b", max_tokens=300)]
    assert theirs.generate(greedy) == own.generate(greedy) and theirs.too_long == 1
    draws = [Request(prompt="Tom has 2.", question="a", sample=i, temperature=1.0, max_tokens=9) for i in range(4)]
    found = theirs.generate(draws)
    assert found[::-1] == theirs.generate(draws[::-1]) and len({r.text for r in found}) > 1  # a seed a sample, whatever the order
    assert theirs.score("Tom has 2.", " Tom buys") == pytest.approx(own.score("Tom has 2.", " Tom buys"), abs=1e-5)


def test_a_cell_without_any_answer_is_asked_again_by_the_same_command(server, stage):
    server.answers = lambda path, body, number: said("The answer is 5.", chat=True) if "steps" in str(body) else (503, b"down")
    config = stage(models={"endpoint": ["direct", "zero_shot_cot"]}, tasks=["word_problems"], cues={"worked": "In steps.", "direct": "No."},
                   endpoint={"url": server.url, "model": "m", "retries": 0})
    with pytest.raises(ValueError, match="1 of 2 cells got no answer at all, endpoint/word_problems/direct first"):
        evaluation.main(config)
    assert len(server.calls) == 7 + 7
    server.answers = lambda path, body, number: said("The answer is 5.", chat=True)
    assert evaluation.main(config).metrics["endpoint/word_problems/direct/finished"]["value"] == 1
    assert len(server.calls) == 7 + 7 + 7  # what was answered was not asked again
