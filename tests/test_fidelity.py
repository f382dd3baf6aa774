"""Every function and test that docs/fidelity.md names exists, and every row names both."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| equation ")
]


def test_the_ledger_is_read():
    assert len(ROWS) > 30 and all(len(row) == 5 and all(row) for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}: {row[1]}")
def test_function_and_test_exist(row):
    name, test = row[2].strip("`"), row[3].strip("`")
    module, *attributes = _split(name)
    value = importlib.import_module(module)
    for attribute in attributes:
        value = getattr(value, attribute)
    assert callable(value) and value.__doc__
    file, function = test.split("::")
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def _split(name: str) -> list[str]:
    """The module of a dotted name, then the attributes below it."""
    parts = ["deepseek_jax", *name.split(".")]
    for end in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:end])
        if path.with_suffix(".py").exists() or (path / "__init__.py").exists():
            return [".".join(parts[:end]), *parts[end:]]
    raise AssertionError(f"{name}: no such module")
