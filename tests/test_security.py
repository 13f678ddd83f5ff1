"""Nothing of a folder or a text that somebody else made is run: pickles, code, templates, paths, tags, and secrets stay where they are."""
import ast
import asyncio
import importlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from jinja2.exceptions import SecurityError
from transformers import AutoTokenizer, Trainer, TrainingArguments

from reward import annotate
from reward.folders import trusted
from reward.model import from_language_model, member_folders
from stages import adopt, chat, export
from stages.evals import rewardbench
from stages.evals.backends import LocalModel
from stages.evals.endpoint import Endpoint
from stages.evals.judge import reward_judge
from stages.models import adapters, upcycling
from stages.models.training import Resumable, fit
from stages.rl.rewards import load_critic, model_reward
from stages.run import audit, page
from stages.run.checkpoint import mark_complete
from stages.run.config import StageConfig, option
from stages.run.manifest import Manifest, Run, hash_path
from stages.run.redaction import redacted, without_secrets
from tests.conftest import ROOT

SOURCES = [p for room in ("prompts", "reward", "stages") for p in (ROOT / room).rglob("*.py")]


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


PICKLED = ("pytorch_model.bin", "adapter_model.bin", "model.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin",
           "scaler.pt")


@pytest.fixture
def canary(tmp_path):
    """A file that is there when something was run: a pickle, code beside a config, or a template's."""
    file = tmp_path / "canary"
    yield file
    assert not file.exists(), "it was run"


def poison(folder, canary, *, weights=True, code=True):
    """Fill a model's folder with what would run: pickles in place of the weights, and Python that its config asks for."""
    for name in PICKLED:
        torch.save(Evil(canary), folder / name)
    if weights:
        for file in folder.glob("*.safetensors"):
            file.unlink()
    if code:
        (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Model:\n    pass\n")
        for name in ("config.json", "tokenizer_config.json"):
            settings = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
            autos = ["AutoTokenizer"] if "tokenizer" in name else ["AutoConfig", "AutoModelForCausalLM",
                                                                   "AutoModelForSequenceClassification"]
            of = dict.fromkeys(autos, "evil.Model")
            (folder / name).write_text(json.dumps(settings | {"auto_map": of, "model_type": "evil"}))


def judged(folder):
    return model_reward(folder, vocab_size=0)


CONFIG = adapters.MethodConfig(method="full")
PLACES = {
    "sft's base": lambda folder: adapters.load_base(folder, CONFIG),
    "the reward model's base": lambda folder: from_language_model(folder, pad_id=0, seed=0),
    "a reward model, in PPO": judged,
    "a reward model, in evaluation": reward_judge,
    "a reward model, under rewardbench": lambda folder: rewardbench.evaluate(rewardbench.arguments(
        ["--model", str(folder), "--data", str(folder / "config.json"), "--out", str(folder / "out")])),
    "a critic": lambda folder: load_critic(folder, vocab_size=0, tokenizer=None),
    "evaluation and chat": lambda folder: LocalModel(folder, seed=0, batch_size=1),
    "chat by a folder": lambda folder: chat.load(chat.ChatConfig(model=str(folder), parents={"reward_model": "none"})),
    "export": lambda folder: export.write_model(folder, folder.parent),
    "adopt": lambda folder: adopt.check(folder, "sft", None),
    "upcycling": lambda folder: upcycling.upcycle(None, str(folder)),
    "an adapter": lambda folder: adapters.load_adapter(torch.nn.Linear(1, 1), folder, "sha256:x"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("how", ["pickles", "code"])
def test_a_hostile_folder_is_refused_and_not_run(place, how, model_folder, canary, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers would ask before it runs code
    folder = tmp_path / "hostile"
    shutil.copytree(model_folder, folder)
    poison(folder, canary, weights=how == "pickles", code=how == "code")
    with pytest.raises(ValueError, match=r"is a pickle, which can run code|wants Python code of its own"):
        PLACES[place](folder)
    assert "evil" not in sys.modules


def test_pickles_beside_sound_weights_are_left_alone(model_folder, canary, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    poison(folder, canary, weights=False, code=False)
    (folder / "adapter_model.bin").unlink()  # which would be put on the model
    assert LocalModel(folder, seed=0, batch_size=1).model is not None
    assert trusted("some/hub-id") == "some/hub-id"


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "evil.bin"])
def test_an_index_names_shards_of_its_own_folder_alone(shard, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(ValueError, match="names the shard"):
        trusted(tmp_path)


class Tiny(Resumable, Trainer):
    """Any trainer of the pipeline, as far as its checkpoints go."""


def test_a_hostile_checkpoint_is_not_run_on_resume(model_folder, canary, tmp_path):
    def trainer():
        rows = [{"input_ids": [7, 8, 9, 10], "labels": [7, 8, 9, 10]}] * 8
        return Tiny(model=LocalModel(model_folder, seed=0, batch_size=1).model, train_dataset=rows, args=TrainingArguments(
            output_dir=str(tmp_path / "checkpoints"), max_steps=4, save_steps=2, per_device_train_batch_size=2, use_cpu=True,
            save_strategy="steps", report_to="none", disable_tqdm=True, remove_unused_columns=False))

    fit(trainer())
    checkpoint = tmp_path / "checkpoints" / "checkpoint-2"
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-4")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        kept = (checkpoint / name).read_bytes()
        torch.save(Evil(canary), checkpoint / name)
        mark_complete(checkpoint, world_size=1)
        if name == "training_args.bin":  # nobody reads it
            fit(trainer())
        else:
            with pytest.raises(Exception, match=r"[Ww]eights.only"):
                fit(trainer())
        assert not canary.exists(), name
        (checkpoint / name).write_bytes(kept)
        shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-4", ignore_errors=True)


def test_the_canary_sings_where_pickles_are_read(tmp_path):
    """The tests above can fail: read without care, the same file runs."""
    file = tmp_path / "model.pt"
    torch.save(Evil(tmp_path / "sang"), file)
    torch.load(file, weights_only=False).close()
    assert (tmp_path / "sang").exists()


def test_a_chat_template_runs_in_a_sandbox(model_folder, canary, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    command = f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}"
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}" + command
    with pytest.raises(SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "{{ 7 * 7 }}"}], tokenize=False,
                                         chat_template="{{ messages[0]['content'] }}") == "{{ 7 * 7 }}"  # a text is no template


def test_the_sources_neither_unpickle_nor_run_what_they_read():
    forbidden = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                assert not forbidden & {name.split(".")[0] for name in names}, path
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert called not in ("eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "torch.load"), f"{path}: {called}"
            assert keywords.get("trust_remote_code", "False") == "False" and keywords.get("allow_pickle", "False") == "False", path
            assert keywords.get("shell", "False") == "False", path
            if re.fullmatch(r"(Auto\w+|GenerationConfig|LoraConfig)\.from_pretrained", called):
                assert ast.unparse(node.args[0]).startswith("trusted("), f"{path}:{node.lineno}: from_pretrained of an unseen folder"


# ---- Paths ----

@pytest.mark.parametrize("name", ["../../etc", "/etc", "link", "model/../../outside"])
def test_products_cannot_lie_outside_of_their_run(name, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "outside").mkdir()
    (run / "link").symlink_to(tmp_path / "outside")
    (run / "manifest.json").write_text(json.dumps({"products": {"model": {"path": name}, "own": {"path": "model"}}}))
    with pytest.raises(ValueError, match="lies outside of it"):
        Manifest(run).product("model")
    moved = tmp_path / "moved"  # a run folder may itself be a link, to another disk
    moved.symlink_to(run)
    assert Manifest(moved).product("own") == moved / "model"


def test_members_of_an_ensemble_lie_in_its_folder(tmp_path):
    (tmp_path / "ensemble.json").write_text(json.dumps({"folders": ["members/1", "../../elsewhere"]}))
    with pytest.raises(ValueError, match="lies outside of it"):
        member_folders(tmp_path)


# ---- Secrets ----

class SecretConfig(StageConfig):
    STAGE = "pretrain"
    PARENTS = ()
    endpoint: dict = option({})


def test_secrets_enter_no_manifest_and_no_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_short-but-secret")
    monkeypatch.setenv("MY_API_KEY", "correct horse battery")
    monkeypatch.setenv("SHORT_KEY", "tiny")
    import dataclasses
    kind = dataclasses.dataclass(frozen=True, kw_only=True)(type("C", (SecretConfig,), {"__annotations__": {"endpoint": dict, "note": str},
                                                                                        "endpoint": option({}), "note": option("")}))
    config = kind(run_dir=str(tmp_path / "run"), endpoint={"url": "https://ann:hunter2pw@host/v1?api_key=abcdef123&n=1"},
                  note="Bearer abcdefgh12345 hf_short-but-secret correct horse battery tiny sk-abcdefghijklmnopqrst")
    run = Run(config)
    changed = Run(dataclasses.replace(config, endpoint={"url": "https://ann:another9@host/v1"}))
    from stages.run.manifest import say
    say("at https://ann:hunter2pw@host")
    changed.finish(metrics={}, notes={})
    Run(config)
    written = "".join(file.read_text() for file in tmp_path.rglob("*.json")) + "".join(capsys.readouterr())
    for secret in ("hunter2", "another9", "abcdef123", "abcdefgh12345", "short-but-secret", "correct horse", "sk-abcdef"):
        assert secret not in written, secret
    assert "https://***@host" in written and "n=1" in written and run.fingerprint != changed.fingerprint
    assert redacted("tiny is no secret, nor https://host/a@b") == "tiny is no secret, nor https://host/a@b"
    assert without_secrets({"a": ["https://u:p@h", 1, None]}) == {"a": ["https://***@h", 1, None]}


def test_a_traceback_file_holds_no_secret(tmp_path, capsys):
    from stages.run.entry import fail
    config = StageConfig(run_dir=str(tmp_path / "run"))
    try:
        raise ValueError("cannot reach https://ann:hunter2pw@host")
    except ValueError as error:
        fail(str(error), config)
    assert "hunter2" not in (tmp_path / "run.traceback.txt").read_text() + capsys.readouterr().err


@pytest.mark.parametrize("url", ["https://ann:hunter2pw@host/v1", "https://host/v1?key=hunter2pw"])
def test_an_endpoint_takes_its_key_from_the_environment_alone(url):
    with pytest.raises(ValueError, match="put the key in the environment variable MY_KEY") as caught:
        Endpoint(url, "m", seed=0, key_variable="MY_KEY")
    assert "hunter2" not in str(caught.value)


# ---- Packages ----

def test_an_audit_that_looked_nothing_up_is_not_called_clean(tmp_path):
    file = tmp_path / "found.json"
    sound, unknown = {"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "not found"}
    bad = {"name": "c", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
    for packages, code, said in (([sound], 0, "1 packages looked up, 0 known"), ([sound, unknown], 3, "NOT DONE for 1 of 2"),
                                 ([unknown, bad], 1, "c 2: CVE-1; mended in 3"), ([], 3, "NOT DONE for 0 of 0")):
        file.write_text(json.dumps({"dependencies": packages}))
        lines, found = audit.told(file)
        assert found == code and said in "\n".join(lines)
    assert audit.told(tmp_path / "none.json")[1] == 3


# ---- Pages ----

def test_markdown_of_a_report_has_no_tags_of_a_model():
    hostile = "<script>alert(1)</script> <img src=x> 1 < 2 <|user|>"
    table = page.Table([hostile, "n"], [[hostile, "1"]], hostile, [hostile])
    text = page.to_markdown(page.Page("t", hostile, [hostile], [], table, [page.Section("k", hostile, [hostile], [], [table])]))
    assert "<script" not in text and "<img" not in text and "1 &lt; 2 &lt;|user|>" in text


def test_the_annotation_page_limits_sizes_and_rates():
    reached, now = [], [0.0]

    async def app(scope, receive, send):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                reached.append("gone")
                return
            if not message.get("more_body"):
                break
        reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    limits = annotate.Limits(app, per_minute=6, logins=2, max_bytes=10, clock=lambda: now[0])

    def ask(path="/", *chunks, client="a", method="POST", length=None):
        sent = []
        parts = list(chunks) or [b""]

        async def receive():
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "path": path, "method": method, "client": (client, 1),
                 "headers": [(b"content-length", str(length).encode())] if length is not None else []}
        asyncio.run(limits(scope, receive, send))
        return sent[0]["status"] if sent else None

    assert ask("/x", b"1234567890", length=10) == 200
    assert ask("/x", length=11) == 413 and ask("/x", length="-1") == 413
    assert ask("/x", b"123456", b"789012") is None and reached[-1] == "gone"  # chunks that never say how many there are
    assert ask("/login", client="b") == ask("/login/", client="b") == 200 and ask("/login", client="b") == 429
    assert ask("/login", client="c") == 200 and ask("/", client="b") == 200
    assert [ask("/") for _ in range(3)] == [200, 200, 429]
    now[0] = 61
    assert ask("/") == 200 and ask("/login", client="b") == 200
    assert os.environ.get("GRADIO_SHARE") is None and importlib.util.find_spec("reward.annotate")


def test_the_hash_of_a_folder_sees_each_file(tmp_path):
    (tmp_path / "a").write_text("1")
    before = hash_path(tmp_path)
    (tmp_path / "b.py").write_text("")
    assert hash_path(tmp_path) != before and Path(tmp_path).exists()
