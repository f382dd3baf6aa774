"""A SHA-256 manifest beside each checkpoint's files: what is read back is what was written.

Orbax, tensorstore and safetensors restore a flipped bit without a word. Each process writes `sha256.<process>.json`
for its own files, after the step has been committed; it is the last thing written, so a step that promises one and
lacks it was cut off.
"""

from __future__ import annotations

import json
import random
import re
from typing import Any, Literal

from deepseek_jax import storage

Verify = Literal["full", "sampled", "off"]

_NAME = re.compile(r"sha256\.(\d+)\.json")
_OF_PROCESS = re.compile(r"(?:ocdbt\.)?process_(\d+)(?:\D.*)?")
_SMALL = 1 << 20  # bytes; files below are hashed in every sample
_SAMPLE = 16  # one in so many of the others


def write(step_dir: Any, process: int, processes: int) -> None:
    """Hashes the files of one process and writes its manifest.

    Args:
        step_dir: the committed step.
        process, processes: which process this is, and of how many.
    """
    files = {
        name: {"size": file.stat().length, "sha256": storage.sha256_file(file)}
        for name, file in _files(step_dir).items()
        if _owner(name) % processes == process
    }
    content = {"format": 1, "process": process, "processes": processes, "files": files}
    storage.write_atomic(step_dir / f"sha256.{process}.json", json.dumps(content, indent=1) + "\n")


def manifests(step_dir: Any) -> list[Any]:
    """The manifest files of a step, by process."""
    found = [file for file in storage.path(step_dir).iterdir() if _NAME.fullmatch(file.name)]
    return sorted(found, key=lambda file: int(_NAME.fullmatch(file.name)[1]))  # type: ignore[index]


def cut_off(step_dir: Any) -> bool:
    """Whether a process was stopped before it wrote its manifest: none is there, or sound ones of fewer processes than
    they say. Anything else that is wrong is damage, which `problems` tells of."""
    files = manifests(step_dir)
    try:
        said = {json.loads(file.read_text())["processes"] for file in files}
    except (ValueError, KeyError, TypeError):
        return False
    return not files or (len(said) == 1 and len(files) < said.pop())


def problems(step_dir: Any, verify: Verify, seed: int | None = None, part: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with the files of a step, a line a file; nothing where all is well.

    Args:
        step_dir: the step.
        verify: "full" hashes every file; "sampled" compares every size, and hashes every small file and one in 16 of
            the others; "off" looks at nothing.
        seed: of the sample; None draws another each time.
        part: (k, n) looks at every n-th file from the k-th, so that n processes share the work.
    """
    if verify == "off":
        return []
    present = _files(step_dir)
    expected: dict[str, dict[str, Any]] = {}
    found = []
    files, said = manifests(step_dir), set()
    for file in files:
        try:
            content = json.loads(file.read_text())
            entries = {
                name: {"size": entry["size"], "sha256": entry["sha256"]} for name, entry in content["files"].items()
            }
            said.add(int(content["processes"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            found.append(f"{file.name}: no manifest of files")
        else:
            expected |= entries
    if not expected and not found:
        found.append("no manifest of files")
    if said - {len(files)}:
        found.append(f"{len(files)} manifests of {sorted(said)} processes")
    found += [f"{name}: missing" for name in expected if name not in present]
    # A file that no manifest lists was not written by the save; Orbax may read it all the same.
    found += [f"{name}: not in the manifest" for name in present if expected and name not in expected]
    draw = random.Random(seed)
    for name in sorted(expected)[part[0] :: part[1]]:
        entry = expected[name]
        if name not in present:
            continue
        size = present[name].stat().length
        if size != entry["size"]:
            found.append(f"{name}: {size} bytes, should be {entry['size']}")
        elif (verify == "full" or size < _SMALL or draw.randrange(_SAMPLE) == 0) and storage.sha256_file(
            present[name]
        ) != entry["sha256"]:
            found.append(f"{name}: its content has changed (SHA-256)")
    return sorted(found)


def _files(step_dir: Any) -> dict[str, Any]:
    """Path relative to the step -> file, manifests left out."""
    root = storage.path(step_dir)
    files = {file.relative_to(root).as_posix(): file for file in storage.list_files(root)}
    return {name: file for name, file in sorted(files.items()) if not _NAME.fullmatch(name)}


def _owner(name: str) -> int:
    """The process that wrote a file: named in its path, or the first."""
    for part in name.split("/"):
        if match := _OF_PROCESS.fullmatch(part):
            return int(match[1])
    return 0
