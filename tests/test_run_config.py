from dataclasses import dataclass
from typing import Literal

import pytest

from stages.run.config import StageConfig, build_config, load_config, option, read_yaml


@dataclass(frozen=True, kw_only=True)
class Example(StageConfig):
    STAGE = "example"
    PARENTS = ("prepare",)

    learning_rate: float = option(1e-3)
    hidden_size: int = option(64)
    method: Literal["lora", "full"] = option("lora")
    names: list[str] = option(["a"])
    limit: int | None = option(None)
    packing: bool = option(False)


def config(tmp_path, text, *flags):
    file = tmp_path / "tiny" / "example.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return load_config(Example, ["--config", str(file), *flags])


def test_defaults_follow_from_the_name_of_the_recipe(tmp_path):
    c = config(tmp_path, "hidden_size: 32\n")
    assert (c.recipe, c.run_dir, c.parents) == ("tiny", "runs/tiny/example", {"prepare": "runs/tiny/prepare"})


def test_flags_win_and_accept_dashes_and_equals(tmp_path):
    c = config(tmp_path, "learning_rate: 1e-2\n", "--hidden-size", "128", "--learning_rate=5e-4", "--parents.prepare", "elsewhere")
    assert (c.hidden_size, c.learning_rate, c.parents["prepare"]) == (128, 5e-4, "elsewhere")


def test_scientific_notation_is_a_number_where_one_is_wanted(tmp_path):
    c = config(tmp_path, "learning_rate: 2e-3\nhidden_size: 1.6e3\n")  # YAML 1.1 reads 2e-3 as a string
    assert c.learning_rate == 2e-3 and c.hidden_size == 1600


@pytest.mark.parametrize(("text", "message"), [
    ("hiden_size: 3", "did you mean 'hidden_size'"),
    ("hidden_size: 64.5", "hidden_size: got 64.5 (float), expected int"),
    ("hidden_size: null", "expected int"),
    ("hidden_size: true", "expected int"),
    ("learning_rate: fast", "expected float"),
    ("method: qlora", "expected lora | full"),
    ("packing: 1", "expected bool"),
    ("names: [1]", "names[0]: got 1"),
    ("parents: {sft: x}", "unknown key 'sft'"),
    ("seed: 1\nseed: 2", "key 'seed' is written twice"),
    ("- a", "must be a mapping"),
    ("a: [", "is not valid YAML"),
])
def test_bad_recipes_fail_with_what_was_got_and_wanted(tmp_path, text, message):
    with pytest.raises(ValueError) as error:
        config(tmp_path, text)
    assert message in str(error.value)


def test_missing_file_and_flag_without_value():
    with pytest.raises(ValueError, match="does not exist"):
        load_config(Example, ["--config", "nowhere.yaml"])
    with pytest.raises(ValueError, match="needs a value"):
        load_config(Example, ["--seed"])


def test_fingerprint_leaves_out_paths_and_logging():
    a = build_config(Example, {"run_dir": "x", "report_to": "wandb"}, recipe="r")
    b = build_config(Example, {}, recipe="s")
    assert a.fingerprinted() == b.fingerprinted()
    assert build_config(Example, {"seed": 1}).fingerprinted() != a.fingerprinted()


def test_a_recipe_named_alone_is_read(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    config(tmp_path / "recipes", "learning_rate: 2e-3\n")
    monkeypatch.chdir(tmp_path)
    found = load_config(Example, ["--recipe", "tiny", "--hidden-size", "32"])
    assert (found.learning_rate, found.hidden_size, found.recipe) == (2e-3, 32, "tiny")
    assert load_config(Example, ["--recipe", "100", "--run-dir", "7"]).recipe == "100"  # a name, whatever it looks like
    assert load_config(Example, ["--recipe", "other"]).learning_rate == 1e-3  # no such file


def test_a_setting_that_came_later_counts_once_it_is_set():
    @dataclass(frozen=True, kw_only=True)
    class Grown(Example):
        experts: int = option(0, added=True)
        kinds: list[str] = option([], added=True)

    assert build_config(Grown, {}).fingerprinted() == build_config(Example, {}).fingerprinted()
    assert build_config(Grown, {"experts": 2}).fingerprinted() == {**build_config(Example, {}).fingerprinted(), "experts": 2}
    assert "kinds" in build_config(Grown, {"kinds": ["a"]}).fingerprinted()


def test_read_yaml_of_an_empty_file(tmp_path):
    (tmp_path / "e.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "e.yaml") == {}


def test_runs_of_other_recipes_move_with_the_runs_folder(monkeypatch):
    monkeypatch.setenv("PLUMBLINE_RUNS", "/disk/runs")
    moved = build_config(Example, {"parents": {"prepare": "runs/other/prepare"}}, recipe="mine")
    assert moved.parents["prepare"] == "/disk/runs/other/prepare" and moved.run_dir == "/disk/runs/mine/example"
    assert build_config(Example, {"parents": {"prepare": "/disk/runs/x"}}, recipe="mine").parents["prepare"] == "/disk/runs/x"
