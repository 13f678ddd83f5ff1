"""docs/ppo.md names flags and tests that exist, and leaves no flag of PPO out."""
import ast
import dataclasses
import re
from pathlib import Path

from stages.ppo import PpoConfig

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8")


def table_rows(columns: int) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
    return [row for row in rows if len(row) == columns and row[0] not in ("what is done", "what") and not row[0].startswith("---")]


def test_every_flag_of_the_page_exists_and_every_flag_is_there():
    fields = {field.name for field in dataclasses.fields(PpoConfig)}
    details = table_rows(4)
    assert len(details) > 30
    named = set()
    for what, flags, _, _ in details:
        names = re.findall(r"`(\w+)`", flags)
        assert names or flags == "always", what
        assert set(names) <= fields, f"{what}: {set(names) - fields}"
        named |= set(names)
    assert set(PpoConfig.__annotations__) <= named, set(PpoConfig.__annotations__) - named


def test_every_test_of_the_page_exists():
    there = {node.name for file in (ROOT / "tests").glob("test_*.py") for node in ast.parse(file.read_text(encoding="utf-8")).body
             if isinstance(node, ast.FunctionDef)}
    for row in table_rows(4) + table_rows(3):
        names = re.findall(r"`(test_\w+)`", row[2])
        assert names, f"{row[0]}: no test"
        assert set(names) <= there, set(names) - there
    assert set(re.findall(r"`(test_\w+)`", PAGE)) <= there
