"""manifest.json: what a run was, so that it can be judged and repeated.

The file's top level is the latest start of the run; `runs` lists every start, the first one first.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from deepseek_jax import storage

_DISTRIBUTION = "deepseek-jax"
_PACKAGES = (
    _DISTRIBUTION,
    *("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint"),
    *("grain", "numpy", "ml_dtypes", "tensorstore", "tokenizers", "tensorflow-datasets", "safetensors", "tyro"),
)
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")


def write_manifest(
    run_dir: str | os.PathLike[str], config_dict: Mapping[str, Any], extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Writes run_dir/manifest.json, or adds a start to it.

    Args:
        run_dir: the run's folder, local or gs://.
        config_dict: the resolved configuration, ready for JSON.
        extra: what the run alone knows: seeds, data summary and fingerprint, mesh axes, the step it starts from.
    Returns: what was written: `config` and `extra`'s entries beside `started`, `command_line`, `python`, `packages`,
        `git` (revision and whether the files differ from it; None outside a checkout), `host`, `devices`,
        `environment` (XLA_FLAGS and its like), and `runs`: the same of every start.
    Raises: ValueError for a value that JSON cannot hold, a name in `extra` that is taken, or a manifest in the folder
        that cannot be read.
    """
    path = storage.path(run_dir) / "manifest.json"
    start = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command_line": shlex.join(sys.argv),
        "python": platform.python_version(),
        "packages": package_versions(),
        "git": git_revision(),
        "host": {"system": platform.platform(), "machine": platform.machine(), "cpu_count": os.cpu_count()},
        "devices": _devices(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "config": dict(config_dict),
    }
    if taken := sorted(set(extra or {}) & {*start, "runs"}):
        raise ValueError(f"extra: the names {taken} are the manifest's own; give others")
    start |= extra or {}
    earlier = _earlier(path)
    kept = {name: earlier[name] for name in ("certificate",) if name in earlier}
    manifest = {**start, **kept, "runs": [*earlier.get("runs", []), start]}
    try:
        text = json.dumps(manifest, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config or extra: JSON cannot hold it ({error})") from None
    storage.write_atomic(path, text + "\n")
    return manifest


def package_versions() -> dict[str, str]:
    """Name -> version of the packages that can change a result, where installed."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_revision() -> dict[str, Any] | None:
    """{"revision": hex, "dirty": bool} of this package's own code, or None.

    An installed copy knows it only when it was installed from git. A checkout that merely contains the environment
    this package is installed in is not meant: the revision counts when git tracks this very file.
    """
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is not None:
        revision = _git(here.parent, "rev-parse", "HEAD")
        if revision:
            changes = _git(here.parent, "status", "--porcelain")
            return {"revision": revision, "dirty": bool(changes)}
    try:
        source = importlib.metadata.distribution(_DISTRIBUTION).read_text("direct_url.json")
        revision = json.loads(source or "{}").get("vcs_info", {}).get("commit_id")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        revision = None
    return {"revision": revision, "dirty": False} if revision else None


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None when it fails or is not there."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _devices() -> dict[str, Any]:
    import jax

    devices = jax.devices()
    return {
        "backend": jax.default_backend(),
        "kind": devices[0].device_kind,
        "count": len(devices),
        "processes": jax.process_count(),
    }


def _earlier(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        earlier = json.loads(path.read_bytes())
        assert isinstance(earlier["runs"], list)
        return earlier
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path}: not a manifest ({error!r}); move it away, or start a new run folder") from None
