"""Every recipe file is one its stage accepts; launch configs hold no key that accelerate would ignore; plans are as their headers say."""
import importlib
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from stages.data.problems import split_spec
from stages.preferences import is_local as preferences_are_local
from stages.run.config import StageConfig, build_config, read_yaml

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
STAGES = ("prepare", "pretrain", "scaling", "sft", "preferences", "reward_model", "ppo", "evaluation", "report")
ASIDE = ("rejection_sampling",)  # stages that no other needs: a recipe may leave them out
FILES = sorted(path for path in RECIPES.glob("*/*.yaml") if path.parent.name != "accelerate")
LAUNCHES = sorted((RECIPES / "accelerate").glob("*.yaml"))


def config_class(stage: str) -> type[StageConfig]:
    module = importlib.import_module(f"stages.{stage}")
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, StageConfig)
             and value.STAGE in (stage,)]
    assert len(found) == 1, f"stages/{stage}.py should have one config class of its own, not {found}"
    return found[0]


def test_there_are_recipes():
    assert {"100m", "1b", "10b"} <= {path.parent.name for path in FILES}
    assert {path.stem for path in LAUNCHES} == {"cpu", "cpu-bf16", "cpu-2", "gpu", "ddp", "fsdp2", "hsdp", "zero2", "zero3"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_parses(path, monkeypatch):
    monkeypatch.delenv("PLUMBLINE_RUNS", raising=False)
    assert path.stem in STAGES + ASIDE, f"{path.stem} is not a stage"
    if importlib.util.find_spec(f"stages.{path.stem}") is None:
        pytest.skip(f"stages/{path.stem}.py is not there")
    config = build_config(config_class(path.stem), read_yaml(path), recipe=path.parent.name, where=str(path))
    assert config.run_dir == f"runs/{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name in ("100m", "350m", "1b", "10b")],
                         ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_header_says_whether_it_has_been_run(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith("#") and re.search(r"\b(not run|run on)\b", first, re.IGNORECASE), first


WHOLE = ("tiny", "smoke", "100m", "1b")
PARTIAL = {"10b": "a plan", "gsm8k": "no reward model"} | dict.fromkeys(("350m", "branches", "shakespeare"), "pretraining alone")


def test_recipes_that_pretrain_are_whole_or_said_to_be_partial():
    assert {path.parent.name for path in RECIPES.glob("*/pretrain.yaml")} == {*WHOLE, *PARTIAL}


@pytest.mark.parametrize("recipe", WHOLE)
def test_whole_recipe_has_every_file_that_make_launches(recipe):
    """`make pretrain sft rlhf evaluate report RECIPE=x`, as make itself says which configs that reads."""
    lines = subprocess.run(["make", "-n", "pretrain", "sft", "rlhf", "evaluate", "report", f"RECIPE={recipe}"], cwd=RECIPES.parent,
                           capture_output=True, text=True, check=True).stdout
    asked = re.findall(r"-m stages\.(\w+) --config (\S+)", lines)
    assert {stage for stage, _ in asked} == set(STAGES)
    for _, file in asked:
        assert (RECIPES.parent / file).is_file(), f"make launches {file}, which is not there"


@pytest.mark.parametrize("recipe", WHOLE)
def test_what_whole_recipes_sample_fits_their_context(recipe):
    def config(stage):
        return build_config(config_class(stage), read_yaml(RECIPES / recipe / f"{stage}.yaml"), recipe=recipe)

    context, preferences = config("prepare").row_length, config("preferences")
    assert config("sft").max_length <= context
    if preferences.source is not None:  # the reward model samples answers to its held-out prompts, which may be that long
        assert preferences.max_length + preferences.max_new_tokens <= context
    assert max(config("ppo").max_new_tokens, config("evaluation").max_tokens_worked) <= context / 2


@pytest.mark.parametrize("recipe", ["100m", "1b"])
def test_recipes_for_gpus_read_real_data_and_name_who_ranked_it(recipe):
    """Every source is a hub id (or, for evaluation and PPO, a format and a hub id), none a file of this machine or a default."""
    hub_id = re.compile(r"[\w-]+/[\w.-]+")
    raw = {stage: read_yaml(RECIPES / recipe / f"{stage}.yaml") for stage in STAGES}
    for source in [*raw["prepare"]["sources"], *(s["data"] for s in raw["sft"]["sources"]), raw["preferences"]["source"]]:
        assert hub_id.fullmatch(source), source
    for spec in [raw["ppo"]["problems"], *raw["evaluation"]["tasks"]]:
        assert hub_id.fullmatch(split_spec(spec)[2]), spec
    assert raw["preferences"]["annotator"].startswith("simulated: GPT-4")
    assert not preferences_are_local(raw["preferences"]["source"])


@pytest.mark.parametrize("path", [p for p in FILES if p.stem in ("sft", "ppo")], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipes_that_make_no_problems_ask_none(path):
    """Before and after, SFT and PPO ask prepare's validation problems unless a recipe says not to."""
    files = {stage: path.parent / f"{stage}.yaml" for stage in ("prepare", path.stem)}
    prepare, config = (build_config(config_class(stage), read_yaml(file) if file.is_file() else {}, recipe=path.parent.name)
                       for stage, file in files.items())
    assert "validation" in prepare.num_problems or config.probe_prompts == 0


@pytest.mark.parametrize("path", RECIPES.glob("*/prepare.yaml"), ids=lambda path: path.parent.name)
def test_prepare_looks_for_every_set_that_its_recipe_evaluates_on(path):
    """Told in two files, since prepare must not be out of date whenever another benchmark is asked. The curriculum is disjoint already."""
    config, other = build_config(config_class("prepare"), read_yaml(path)), path.with_name("evaluation.yaml")
    if config.sources != ["curriculum"] and other.is_file():
        asked = build_config(config_class("evaluation"), read_yaml(other)).tasks
        assert {spec for spec in asked if ":" in spec} <= set(config.evaluation_sets)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_plan_for_engines_that_divide_the_weights(engine, monkeypatch, capsys):
    from stages.plan import PlanConfig, main

    monkeypatch.chdir(RECIPES.parent)
    few, many = (main(build_config(PlanConfig, {"engine": engine, "devices": n}, recipe="1b")) for n in (8, 16))
    whole = [8 * planned["counts"]["total"] for planned in (few, many)]  # reward model, reference and sampling copy
    divided = [planned["memory"]["ppo"]["weights"] - kept for planned, kept in zip((few, many), whole, strict=True)]
    assert divided[1] == pytest.approx(divided[0] / 2, abs=1) and divided[1] > 0
    assert "share_prompts" not in capsys.readouterr().out
    main(build_config(PlanConfig, {"engine": engine, "devices": 8}, recipe="100m"))  # keeps the default of the reward model
    assert f"share_prompts does not work with {engine}: set share_prompts: false in reward_model.yaml" in capsys.readouterr().out


def test_plan_counts_pairs_where_preferences_have_a_source(monkeypatch):
    from stages import plan

    monkeypatch.chdir(RECIPES.parent)

    def planned(**preferences):
        monkeypatch.setattr(plan, "read_yaml", lambda path: read_yaml(path) | (preferences if path.stem == "preferences" else {}))
        return plan.main(build_config(plan.PlanConfig, {"devices": 8}, recipe="100m"))["memory"]["reward_model"]["activations"]

    assert planned(source=None) == 4 * planned()  # eight responses a prompt, and two


@pytest.mark.parametrize(("recipe", "engine", "devices"), [
    ("100m", "ddp", 8), ("350m", "ddp", 8), ("1b", "ddp", 8), ("1b", "fsdp2", 16), ("1b", "zero3", 8), ("10b", "fsdp2", 256),
    ("10b", "zero3", 64)])
def test_plan_fits_and_header_has_its_parameters(recipe, engine, devices, monkeypatch, capsys):
    from stages.plan import PlanConfig, main

    monkeypatch.chdir(RECIPES.parent)
    figures = main(build_config(PlanConfig, {"engine": engine, "devices": devices}, recipe=recipe))
    assert figures["fits"]["pretrain"]
    stated = re.search(r"Parameters: ([\d,]+) in all, ([\d,]+) without", (RECIPES / recipe / "pretrain.yaml").read_text())
    assert stated is not None
    counts = figures["counts"]
    assert [int(number.replace(",", "")) for number in stated.groups()] == [counts["total"], counts["non_embedding"]]
    printed = capsys.readouterr().out
    assert "warning" not in printed
    ladder = RECIPES / recipe / "scaling.yaml"
    share = re.search(r"together (\d+) %", ladder.read_text()) if ladder.is_file() else None
    if share:
        assert f"{int(share.group(1))}." in printed.split("FLOPs, ")[-1], "the share of the ladder is another"


@pytest.mark.parametrize("stage", ["sft", "preferences", "reward_model", "ppo"])
def test_plan_knows_the_defaults_of_stages_it_may_not_import(stage):
    from stages.plan import DEFAULTS

    config = build_config(config_class(stage), {}, recipe="x")
    assert {key: getattr(config, key) for key in DEFAULTS[stage]} == DEFAULTS[stage]


def test_ten_billion_do_not_fit_one_device_each(monkeypatch, capsys):
    from stages.plan import PlanConfig, main

    monkeypatch.chdir(RECIPES.parent)
    assert not main(build_config(PlanConfig, {"engine": "ddp", "devices": 64}, recipe="10b"))["fits"]["pretrain"]


@pytest.mark.parametrize("recipe", ["100m", "1b"])
def test_budgets_of_the_ladder_are_whole_batches(recipe):
    batch = read_yaml(RECIPES / recipe / "pretrain.yaml")["batch_tokens"]
    for tokens in read_yaml(RECIPES / recipe / "scaling.yaml")["tokens"]:
        assert tokens % batch == 0
    assert read_yaml(RECIPES / recipe / "pretrain.yaml")["tokens"] % batch == 0


def nested_keys() -> set[str]:
    """Keys that accelerate launch reads out of the nested sections; any other is set on its arguments and never looked at."""
    return {action.dest for action in launch_command_parser()._actions}


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_launch_config_has_no_ignored_key(path):
    config = load_config_from_file(str(path))  # raises on an unknown key at the top level
    assert isinstance(config, ClusterConfig)
    sections = {"fsdp_config", "deepspeed_config", "parallelism_config"}
    for section in sections:
        unknown = set(getattr(config, section) or {}) - nested_keys()
        assert not unknown, f"{path}: accelerate silently ignores {section}: {', '.join(unknown)}"
    others = {key for key, value in yaml.safe_load(path.read_text()).items() if isinstance(value, dict)}
    assert others <= sections
    first = path.read_text().splitlines()
    assert any(re.search(r"\b(Not run|Run:)", line) for line in first if line.startswith("#"))


def test_a_misspelt_nested_key_would_be_noticed():
    assert "fsdp_reshard_after_forwards" not in nested_keys()
    assert {"fsdp_version", "fsdp_state_dict_type", "zero_stage", "deepspeed_multinode_launcher"} <= nested_keys()


def test_launch_configs_ask_for_what_their_names_say():
    configs = {path.stem: load_config_from_file(str(path)) for path in LAUNCHES}
    types = {name: config.distributed_type.value for name, config in configs.items()}
    assert types == {"cpu": "NO", "cpu-bf16": "NO", "cpu-2": "MULTI_GPU", "gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "hsdp": "FSDP",
                     "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    for name, config in configs.items():
        assert config.use_cpu == name.startswith("cpu")
        assert config.mixed_precision == ("no" if name in ("cpu", "cpu-2") else "bf16")
        if config.num_processes > 1:
            assert config.rdzv_backend == "static"
    assert configs["cpu-2"].num_processes == 2
    for name in ("fsdp2", "hsdp"):
        assert configs[name].fsdp_config["fsdp_version"] == 2 and not configs[name].fsdp_config["fsdp_cpu_ram_efficient_loading"]
    hybrid = configs["hsdp"].parallelism_config
    assert hybrid["parallelism_config_dp_replicate_size"] * hybrid["parallelism_config_dp_shard_size"] == configs["hsdp"].num_processes
    assert [configs[f"zero{stage}"].deepspeed_config["zero_stage"] for stage in (2, 3)] == [2, 3]


@pytest.mark.parametrize(("ending", "requeued"), [("", False), ("exit 1", False), ("mkdir -p $M; echo {} > $M/PREEMPTED; exit 2", True)])
def test_the_slurm_script_queues_a_preempted_job_again_and_no_other(ending, requeued, tmp_path):
    """With stand-ins for srun (which starts a task on each of two nodes), scontrol and make."""
    bin_, mark = tmp_path / "bin", tmp_path / "runs" / "tiny" / "sft.partial"
    bin_.mkdir()
    mark.mkdir(parents=True)
    (mark / "PREEMPTED").write_text("of an earlier job")
    for name, text in {
            "srun": 'shift; for i in 0 1; do SLURM_NODEID=$i "$@" || code=$?; done; exit ${code:-0}',
            "scontrol": f'echo "scontrol $*" >> {tmp_path}/log; [ "$1" = requeue ] || printf "a1\\na2\\n"',
            "make": f"M={mark}; echo make $1 $RECIPE $ACCELERATE $NUM_MACHINES $MACHINE_RANK $MAIN_ADDRESS $MAIN_PORT >> {tmp_path}/log; "
                    f"kill -USR1 $$; {ending}"}.items():  # that launchers have to ignore
        (bin_ / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin_ / name).chmod(0o755)
    environment = {"PATH": f"{bin_}:/usr/bin:/bin", "SLURM_NNODES": "2", "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "a[1-2]",
                   "PLUMBLINE_RUNS": str(tmp_path / "runs"), "STAGE": "sft", "RECIPE": "tiny", "ACCELERATE": "ddp"}
    done = subprocess.run(["bash", str(RECIPES / "accelerate" / "slurm.sh")], env=environment, capture_output=True, text=True)
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line for line in lines if line.startswith("make")] == [f"make sft tiny ddp 2 {rank} a1 22345" for rank in (0, 1)]
    assert ("scontrol requeue 12345" in lines) == requeued, done.stdout + done.stderr
    assert (done.returncode == 0) == (not ending)


def test_the_slurm_script_starts_one_launcher_a_node_and_says_whether_it_was_run():
    text = (RECIPES / "accelerate" / "slurm.sh").read_text()
    assert "#SBATCH --ntasks-per-node=1" in text and "#SBATCH --signal=USR1@" in text and re.search(r"^# Not run", text, re.MULTILINE)
