"""prepare in this process: what it refuses leaves the earlier product as it was, and what it records of its inputs."""
import pytest

from stages import prepare
from stages.run.config import build_config
from stages.run.manifest import Manifest

SMALL = {"num_problems": {"sft": 2}, "vocab_size": 300, "row_length": 32, "document_chars": 40, "heldout_share": 0.3}


def run(folder, source, **values):
    return prepare.main(build_config(prepare.PrepareConfig, {
        "run_dir": str(folder / "prepare"), "sources": [str(source)], **SMALL, **values}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "play.txt").write_text("\n\n".join(f"FIRST CITIZEN {i}: speak, speak {i * i}." for i in range(60)))
    run(folder, folder / "play.txt")
    return folder


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("name", "content", "message"), [
    ("bad.txt", b"", "no document is left of .*bad.txt: it holds none"),
    ("bad.txt", b" \n\n \n", r"no document is left of .*: all 1 were dropped \(1 empty or too short after cleaning\)"),
    ("bad.txt", b"PK\0\x01", "bad.txt is binary"),
    ("bad.txt", b"abc\xff", "bad.txt: byte 0xff at offset 3 is not UTF-8"),
    ("bad.jsonl", b'{"text": "x"}\nnot json\n', "bad.jsonl, line 2 is not JSON"),
])
def test_bad_input_leaves_the_earlier_run_as_it_was(finished, tmp_path, name, content, message):
    before = everything(finished / "prepare")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(finished, tmp_path / name)
    assert everything(finished / "prepare") == before and len(before) > 8
    assert run(finished, finished / "play.txt").fingerprint == Manifest(finished / "prepare").fingerprint


def test_a_tokenizer_of_ones_own_is_an_input_by_what_its_folder_holds(finished, tmp_path):
    import shutil

    own = tmp_path / "own"
    shutil.copytree(finished / "prepare" / "tokenizer", own)
    first = run(tmp_path, finished / "play.txt", tokenizer=str(own))
    assert first.data["inputs"]["tokenizer"].startswith("sha256:")
    (own / "model.safetensors").write_bytes(b"weights")
    assert run(tmp_path, finished / "play.txt", tokenizer=str(own)).fingerprint == first.fingerprint
    config = own / "tokenizer_config.json"
    config.write_text(config.read_text() + "\n")
    assert run(tmp_path, finished / "play.txt", tokenizer=str(own)).fingerprint != first.fingerprint
