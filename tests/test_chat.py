"""The terminal chat: commands, streaming, scores, and nothing that a model says is obeyed by the terminal."""
import io
import json
import re
import subprocess
import sys

import pytest

from stages import chat
from stages.evals.backends import LocalModel
from stages.evals.judge import reward_judge
from tests.conftest import ROOT

WORDS = "What is 2 + 3?"


@pytest.fixture
def talk(stage, tmp_path):
    def make(name="sft", **settings):
        stage()  # makes the parents
        parents = {parent: str(tmp_path / parent) for parent in chat.ChatConfig.PARENTS}
        return chat.load(chat.ChatConfig(stage=name, parents=parents, **{"max_new_tokens": 12, "seed": 3} | settings))

    return make


def said(talk, *lines):
    out = io.StringIO()
    chat.chat(talk, io.StringIO("".join(line + "\n" for line in lines)), out)
    return out.getvalue()


def test_a_reply_is_the_samplers_with_its_score_and_settings(talk, tmp_path):
    text = said(talk(temperature=0.5), WORDS)
    backend = LocalModel(tmp_path / "sft" / "model", seed=3, batch_size=1)
    prompt = [{"role": "user", "content": WORDS}]
    ids = chat.sample(backend.model, [backend.encode(prompt)], keys=[(chat.prompt_key(repr(prompt)), 0)], seed=3, temperature=0.5,
                      max_new_tokens=12, eos_ids=backend.end_of_turn, pad_id=backend.pad_id,
                      never=chat.marks(backend, backend.end_of_turn))[0]
    reply = backend.read(ids, backend.end_of_turn, ())
    assert f"> {WORDS}\n{chat.harmless(reply.text)}\n[12 tokens | " in text
    assert re.search(r"\| \d+ tok/s \| cut at 12 tokens \| temperature 0.5, max_new_tokens 12, seed 3 \|", text)
    (judged,) = reward_judge(tmp_path / "reward_model" / "model")([chat.Score(prompt=prompt, response=reply.text, ended=False, question="")]
    )
    assert f"| score {judged.score:+.2f}]" in text


@pytest.mark.parametrize("name", ["sft", "pretrain"])
def test_padding_and_marks_of_turns_are_not_drawn(talk, name):
    session = talk(name, temperature=0)
    tokenizer, ends = session.backend.tokenizer, session.backend.end_of_text if name == "pretrain" else session.backend.end_of_turn
    special = [id for id in tokenizer.all_special_ids if id not in ends]
    assert tokenizer.pad_token_id in special and len(special) > 2

    def fond(module, given, logits):  # would say nothing else
        logits[..., special] += 1e3

    session.backend.model.lm_head.register_forward_hook(fond)
    assert "<|" not in said(session, WORDS)


def test_the_reply_streams(talk):
    class Screen(io.StringIO):
        def flush(self):
            seen.append(self.getvalue())

    seen = []
    chat.chat(talk(), io.StringIO(WORDS + "\n"), Screen())
    during = [text for text in seen if WORDS in text and " tok/s" not in text]
    assert len({len(text) for text in during}) > 5, "the reply came at once"


def test_commands_change_what_comes_and_faults_are_said(talk):
    session = talk()
    text = said(session, "/set temperature 0", "/set seed 9", "/set temperature -1", "/set colour red", "/set seed x", "/nope", "/help",
                WORDS, WORDS, "/reset", WORDS, "/quit", "never read")
    for expected in ("temperature is 0.0", "seed is 9", "error: temperature is -1: set it to 0 or more", "error: unknown setting 'colour'",
                     "error: seed: got 'x', expected int", "unknown command /nope", "/reset               begin"):
        assert expected in text
    first, second, third = re.findall(r"> What is 2 \+ 3\?\n(.*?)\n\[12 tokens", text, re.DOTALL)
    assert first == third != second, "the second reply follows the first turn, the third begins anew"
    assert "never read" not in text and len(session.turns) == 2


def test_the_base_continues_text_without_a_score(talk):
    session = talk("pretrain")
    text = said(session, "Tom has 2 apples.", "/set temperature 0")
    assert "The base continues each line as text." in text and "score" not in text.split("> Tom")[1] and not session.turns


def test_terminal_escapes_of_a_model_do_nothing(talk, monkeypatch):
    evil = "\x1b]0;owned\x07\x1b[2J\r\b\u202egnp\x9b31m\n\ttab"
    assert chat.harmless(evil) == "<U+001B>]0;owned<U+0007><U+001B>[2J<U+000D><U+0008><U+202E>gnp<U+009B>31m\n\ttab"
    session = talk()
    monkeypatch.setattr(session.backend.tokenizer, "decode", lambda ids, **more: "x" * len(ids) + evil)
    text = said(session, "go \x1b[31m", "/\x1b[2J")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text) and "owned" in text


def test_a_long_conversation_forgets_its_oldest_turn(talk):
    session = talk(system="Be brief.")
    text = said(session, *[f"Question number {i}: what is {i} + {i}?" for i in range(12)])
    assert "its oldest turn is forgotten" in text and text.count("[12 tokens") + text.count(" tok/s") >= 12 and "error" not in text
    assert not any("number 0" in turn["content"] for turn in session.turns)
    assert "say it shorter" in said(session, "word " * 400)


def test_ctrl_c_stops_a_reply_and_not_the_chat(talk, monkeypatch):
    session, real = talk(), chat.sample

    def interrupted(*given, heard, **more):
        count = iter(range(9))

        def tell(token):
            heard(token)
            if next(count) == 3:
                raise KeyboardInterrupt

        return real(*given, heard=tell, **more)

    monkeypatch.setattr(chat, "sample", interrupted)
    text = said(session, WORDS, "/set seed 1")
    assert "[4 tokens | " in text and "| stopped |" in text and "seed is 1" in text and len(session.turns) == 2


def test_missing_models_are_named(talk, tmp_path):
    with pytest.raises(ValueError, match=r"no finished run in .*rejection_sampling"):
        talk("rejection_sampling")
    with pytest.raises(ValueError, match=r"is no model's folder \(it has no config.json\)"):
        talk(model=str(tmp_path / "prepare"))
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        talk(max_new_tokens=0)


def test_piped_through_the_command_line(talk, tmp_path):
    talk()
    done = subprocess.run([sys.executable, "-m", "stages.chat", "--model", str(tmp_path / "sft" / "model"), "--max-new-tokens", "8",
                           "--parents", json.dumps({"reward_model": str(tmp_path / "reward_model")})], cwd=ROOT, input=WORDS + "\n/quit\n",
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "[8 tokens" in done.stdout and "| score " in done.stdout, done.stderr[-2000:]
