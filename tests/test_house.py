"""The house stands as README draws it: imports one way, entry files small, documented commands real."""
import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for room in ("prompts", "reward", "stages") for p in (ROOT / room).rglob("*.py"))
RANK = {"prompts": 0, "reward": 1, "stages.run": 2, "stages.data": 3, "stages.laws": 3, "stages.models": 4, "stages.rl": 5,
        "stages.evals": 5, "stages": 6}


def room(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if ".".join(parts[:2]) in RANK else parts[0]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = room(module_of(path))
    for name in imports(path):
        if name.split(".")[0] in ("prompts", "reward", "stages") and name != "stages" and (room(name) != own or own == "stages"):
            assert RANK[room(name)] < RANK[own], f"{module_of(path)} imports {name}"


@pytest.mark.parametrize("folder", ["prompts", "stages/run"])
def test_light_rooms_import_no_torch_at_their_head(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            assert not any(n.split(".")[0] in ("torch", "transformers", "accelerate") for n in names), path


def test_entry_files_are_small_and_there_is_no_package_init():
    for path in (ROOT / "stages").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 260, path
    assert not [p for p in SOURCES if p.name in ("__init__.py", "utils.py")]


def test_every_make_target_of_the_documents_exists():
    targets = set(re.findall(r"^([a-z_-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for line in re.findall(r"(?:^    |`)(?:[A-Z_]+=\S+ )*make ([^`#\n]*)", page.read_text(encoding="utf-8"), re.MULTILINE):
            for word in re.sub(r'[A-Z_]+=("[^"]*"|\S*)|(?<!\S)-\S+|\.\.\.', " ", line).split():
                assert word in targets, f"{page.name}: make {word}"


def test_every_file_that_the_documents_name_exists():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"\b(?:stages|reward|prompts|recipes|docs)/[\w/.-]+\.(?:py|yaml|md)\b", text):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_every_locked_package_but_torch_is_installed_by_its_hash():
    """requirements-hashes.lock is what `make setup` installs, requirements.lock what people edit; `make lock` brings one to the other."""
    pins = {line for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line and not line.startswith("#")}
    hashed = re.split(r"\n(?=\S)", re.sub(r"(?m)^#.*\n", "", (ROOT / "requirements-hashes.lock").read_text()).strip())
    named = {entry.split(" ")[0].lower().replace("_", "-") for entry in hashed}
    assert named == {pin.lower().replace("_", "-") for pin in pins if not pin.startswith("torch==")}
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in hashed)


def test_dry_run_prints_plain_launch_lines():
    """`make -n` shows what can be pasted: the accelerate line of each stage, with its recipe."""
    lines = subprocess.run(["make", "-n", "pretrain", "sft", "rlhf", "ACCELERATE=cpu-2"], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout
    for stage in ("prepare", "scaling", "pretrain", "sft", "preferences", "reward_model", "ppo"):
        assert re.search(rf"accelerate launch --config_file recipes/accelerate/cpu-2.yaml -q +-m stages.{stage} "
                         rf"--config recipes/tiny/{stage}.yaml", lines), stage
