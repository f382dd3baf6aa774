"""The house stands: imports go down, files stay short, and importing the package is quiet.

The floors are those of docs/architecture.md.
"""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import deepseek_jax

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "deepseek_jax"

# From the top down. A room may import rooms of the floors below its own.
FLOORS = (
    {"cli"},
    {"posttrain", "planner", "evaluate", "serve"},
    {"training", "infer"},
    {"chat", "data", "checkpoint", "interop", "metrics", "storage"},
    {"models"},
    {"layers"},
    {"parallel", "kernels"},
    {"config", "types", "platform", "serialize", "hardware"},  # single files, free to import one another
)
# Arrows within a floor: importer -> imported.
ARROWS = {
    ("training", "infer"),  # a run ends with sampled continuations
    ("planner", "posttrain"),  # the update whose memory it asks the compiler for
    ("chat", "data"),  # the tokenizer
    ("chat", "storage"),
    ("data", "storage"),
    ("checkpoint", "storage"),
    ("interop", "storage"),
    ("metrics", "storage"),
}
LONGEST_FILE = 350
LONGEST_KERNEL = 500

_FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
_GROUND = len(FLOORS) - 1


def imported_modules(source: str, module: str) -> Iterator[str]:
    """Dotted names that `source`, the text of `module` (a package ends in `.__init__`), imports, wherever they stand."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from deepseek_jax import layers` names a room; `from deepseek_jax.layers import mla` already has it.
            yield from (f"{base}.{alias.name}" for alias in node.names) if base == "deepseek_jax" else (base,)


def room_of(module: str) -> str | None:
    """The room of a dotted module of this package; None for the package's root and for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "deepseek_jax" and len(parts) > 1 and parts[1] != "__init__" else None


def wrong_imports(source: str, module: str) -> list[str]:
    """What is wrong with the imports of one module, as sentences."""
    importer, wrong = room_of(module), []
    if importer is None:
        return []  # the root re-exports rooms lazily
    if importer not in _FLOOR_OF:
        return [f"{module}: {importer} stands on no floor; add it to FLOORS and docs/architecture.md"]
    for name in imported_modules(source, module):
        if name.split(".")[0] != "deepseek_jax":
            continue
        imported = room_of(name)
        if imported not in _FLOOR_OF:  # the root itself, or one of the names that it exports
            if importer != "cli":
                wrong.append(f"{module} imports {name} from the root: name the room that defines it")
        elif imported != importer and (importer, imported) not in ARROWS:
            if _FLOOR_OF[imported] < _FLOOR_OF[importer]:
                wrong.append(f"{module} imports {name}: up, from {importer} to {imported}")
            elif _FLOOR_OF[imported] == _FLOOR_OF[importer] != _GROUND:
                wrong.append(f"{module} imports {name}: sideways, from {importer} to {imported}, where no arrow stands")
    return wrong


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_imports_go_down():
    found = [
        wrong for path in sorted(PACKAGE.rglob("*.py")) for wrong in wrong_imports(path.read_text(), module_of(path))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("deepseek_jax.layers.mla", "from deepseek_jax.kernels.attention import attention", False),
        ("deepseek_jax.layers.mla", "from deepseek_jax.layers.norm import RMSNorm", False),
        ("deepseek_jax.layers.mla", "from .norm import RMSNorm", False),
        ("deepseek_jax.layers.mla", "from deepseek_jax import platform", False),
        ("deepseek_jax.data.tokens", "from deepseek_jax.storage import write_atomic", False),
        ("deepseek_jax.cli.train", "import deepseek_jax as dsj", False),
        ("deepseek_jax.layers.mla", "from deepseek_jax.models.block import Block", True),
        ("deepseek_jax.layers.mla", "import deepseek_jax.models", True),
        ("deepseek_jax.layers.mla", "from ..models import block", True),
        ("deepseek_jax.layers.__init__", "from .. import models", True),
        ("deepseek_jax.layers.mla", "def f():\n    from deepseek_jax import train", True),
        ("deepseek_jax.kernels.attention.__init__", "from deepseek_jax.parallel import shard", True),
        ("deepseek_jax.infer.generate", "from deepseek_jax.training.loop import train", True),
        ("deepseek_jax.attic.old", "import os", True),
    ],
)
def test_the_walk_sees_what_it_should(module, source, wrong):
    assert bool(wrong_imports(source, module)) == wrong


def test_files_can_be_read_in_one_sitting():
    folders = ("deepseek_jax", "configs", "tests", "benchmarks", "experiments", "scripts")
    too_long = []
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        limit = LONGEST_KERNEL if "kernels" in path.parts else LONGEST_FILE
        lines = len(path.read_text().splitlines())
        if lines > limit:
            too_long.append(f"{path.relative_to(ROOT)}: {lines} lines, limit {limit}")
    assert not too_long, "\n".join(too_long)


def run_python(program: str) -> None:
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, check=True, timeout=120)


@pytest.mark.smoke
def test_importing_the_package_imports_nothing_heavy():
    run_python(
        """
        import sys
        import deepseek_jax
        heavy = {"jax", "jaxlib", "flax", "numpy", "orbax", "grain", "tyro", "tensorflow_datasets", "matplotlib"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        """
    )


@pytest.mark.smoke
def test_using_the_package_opens_no_socket_and_starts_no_backend():
    """Every public name is imported; what is needed only to run, or to read and write, is still not there."""
    run_python(
        """
        import socket
        import sys

        def refuse(*args, **kwargs):
            raise AssertionError("a socket was opened")

        socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
        import deepseek_jax
        for name in deepseek_jax.__all__:
            getattr(deepseek_jax, name)
        for name in deepseek_jax.list_configs():
            deepseek_jax.get_config(name)

        from jax._src import xla_bridge
        assert not xla_bridge.backends_are_initialized()
        late = {"orbax", "grain", "tyro", "tensorflow_datasets", "matplotlib"}
        assert not late & set(sys.modules), late & set(sys.modules)
        """
    )


def test_lazy_exports_are_what_type_checkers_see():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"deepseek_jax.{home}" for name, home in deepseek_jax._HOME.items()}
    assert set(deepseek_jax.__all__) == {*seen, "__version__"}
    assert set(deepseek_jax.__all__) <= set(dir(deepseek_jax))


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = deepseek_jax.trian
