"""Files on disk: the one place that writes whole files, so that a reader never meets half of one.

Data, checkpoints and metrics write through here. Local paths only for now; a cloud path needs changes here and
nowhere else.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Writes a whole file, or leaves the old one: a killed process never leaves a part of it under its name.

    Args:
        path: the file; missing parent folders are made.
        content: text (written as UTF-8, newlines as they are) or bytes.
    Returns: the path.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def save_array(path: str | os.PathLike[str], array: np.ndarray) -> Path:
    """Writes an array as one .npy file, whole or not at all. Returns the path."""
    path = Path(path)
    temporary = _beside(path)
    try:
        with temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def map_array(path: str | os.PathLike[str]) -> np.ndarray:
    """Opens a .npy file as a read-only memory map. Raises ValueError when the file is cut short or is no .npy file."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _beside(path: Path) -> Path:
    """A name in the same folder (so that the final replace stays within one file system), apart for each process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
