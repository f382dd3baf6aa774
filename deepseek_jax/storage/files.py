"""Whole files: written at once, read, mapped, hashed, listed and deleted."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.util
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from etils import epath

AnyPath = str | os.PathLike[str]

_CHUNK = 8 * 2**20  # bytes read at once where a file is streamed
_KEEPS = ".folder"  # the object that keeps an empty folder of a bucket in being


def path(p: AnyPath) -> epath.Path:
    """The path as an `epath.Path`; `~` stands for the home folder.

    Raises: ValueError for a kind of URI other than gs://, a gs:// that pathlib has garbled, or where gcsfs is missing.
    """
    text = os.fspath(p)
    if text.startswith("gs:/") and not text.startswith("gs://"):
        raise ValueError(f"{text!r}: pathlib.Path drops a slash of gs://; pass cloud paths as str or epath.Path")
    if is_local(text):
        return epath.Path(text).expanduser()
    if not text.startswith("gs://"):
        raise ValueError(f"{text!r}: give a local path or a gs:// one")
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(f"{text!r}: gs:// needs gcsfs: pip install 'deepseek-jax[gcs]'")
    cloud()
    return epath.Path(text)


def is_local(p: AnyPath) -> bool:
    """Whether the path is one of this machine's file system, rather than a URI such as gs://bucket/run."""
    return "://" not in os.fspath(p)


def cache_folder() -> Path:
    """Where this machine keeps what it can make or fetch again: $XDG_CACHE_HOME/deepseek_jax, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepseek_jax"


def write_atomic(p: AnyPath, content: str | bytes) -> epath.Path:
    """Writes a whole file, or leaves the old one: neither a killed process nor a power cut leaves a part of it.

    Args:
        p: the file; missing parent folders are made.
        content: text (written as UTF-8, newlines as they are) or bytes.
    Returns: the path.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_local(p):
        with _replacing(path(p)) as temporary:
            temporary.write_bytes(data)
    else:
        with _plain_errors(path(p)) as uri:
            cloud().pipe_file(uri, data, consistency="md5")
    return path(p)


def save_array(p: AnyPath, array: np.ndarray) -> epath.Path:
    """Writes an array as one .npy file, whole or not at all. Returns the path."""
    with new_file(p) as stream:
        np.save(stream, array, allow_pickle=False)
    return path(p)


@contextlib.contextmanager
def new_file(p: AnyPath) -> Iterator[IO[bytes]]:
    """A stream to a file that has its name only once it is whole; an error leaves the old one.

    A cloud object is put together in this machine's temporary folder first.
    """
    if is_local(p):
        with _replacing(path(p)) as temporary, temporary.open("wb") as stream:
            yield stream
        return
    with tempfile.NamedTemporaryFile() as stream:
        yield stream
        stream.flush()
        upload(Path(stream.name), path(p))


def map_array(p: AnyPath) -> np.ndarray:
    """Opens a .npy file as a read-only memory map.

    A cloud object is fetched once into `cache_folder()`, checked against the object's size and MD5, and fetched anew
    when the object has changed.

    Raises: ValueError when the file is cut short, or is no .npy file of plain numbers; FileNotFoundError.
    """
    file = Path(path(p)) if is_local(p) else _fetched(path(p))
    try:
        return np.lib.format.open_memmap(file, mode="r")
    except (EOFError, ValueError) as error:
        raise ValueError(f"{os.fspath(p)}: {error}") from None


def read_bytes(p: AnyPath, start: int = 0, end: int | None = None) -> bytes:
    """The bytes start:end of a file, fewer where it ends before; None reads to the end. Raises FileNotFoundError."""
    if is_local(p):
        with open(path(p), "rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else max(end - start, 0))
    with _plain_errors(path(p)) as uri:
        return cloud().cat_file(uri, start=start or None, end=end)


def sha256_file(p: AnyPath) -> str:
    """The hex SHA-256 of a file's bytes, read in chunks. Raises FileNotFoundError."""
    digest = hashlib.sha256()
    with _plain_errors(path(p)), path(p).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)  # type: ignore[arg-type]
    return digest.hexdigest()


def make_folder(p: AnyPath) -> epath.Path:
    """Makes a folder, with its parents, where it is missing. Returns the path.

    A bucket has no folders, only names that begin alike: one that loses its last file is gone, and a program that is
    just listing it fails, Orbax among them. So a small object, `.folder`, is put into it.
    """
    folder = path(p)
    if is_local(folder):
        folder.mkdir(parents=True, exist_ok=True)
    elif not (folder / _KEEPS).exists():
        write_atomic(folder / _KEEPS, "keeps this folder in being while it is empty\n")
    return folder


def list_files(folder: AnyPath) -> list[epath.Path]:
    """Every file under a folder, however deep, by name; [] where there is none.

    Files being written are left out, and what a killed `write_atomic` left, and what `make_folder` put there.
    """
    if is_local(folder):
        found = [Path(root) / name for root, _, names in os.walk(path(folder)) for name in names]
    else:
        with _plain_errors(path(folder)) as uri:  # the slash keeps an object `run` apart from the folder `run/`
            found = ["gs://" + name for name in cloud().find(uri + "/") if not name.endswith("/")]
    files = (epath.Path(name) for name in found)
    return sorted(file for file in files if file.name != _KEEPS and not _is_temporary(file.name))


def remove_tree(p: AnyPath) -> None:
    """Deletes a folder and all that it holds, or a file. One that is not there is no error."""
    target = path(p)
    if not is_local(target):
        # A marker object that stands for a folder can survive the first pass.
        for _ in range(2):
            with contextlib.suppress(FileNotFoundError), _plain_errors(target) as uri:
                cloud().rm(uri, recursive=True)
    elif os.path.isdir(target) and not os.path.islink(target):
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


@contextlib.contextmanager
def _replacing(target: epath.Path) -> Iterator[Path]:
    """A name to write to, in the same folder (so that the replace stays within one file system), apart for each
    process and thread; it takes the target's name once its bytes are on the disk."""
    final = Path(target)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def cloud() -> Any:
    """gcsfs, as the very object that epath uses: fsspec keeps one for each set of arguments.

    Lists are asked for anew each time, because other machines write into the same folders.
    """
    import fsspec
    import fsspec.config

    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem("gcs", finalize_on_close=True)


@contextlib.contextmanager
def _plain_errors(target: epath.Path) -> Iterator[str]:
    """Turns gcsfs's and aiohttp's errors into OSErrors that name the object. Gives its URI."""
    uri = os.fspath(target)
    try:
        yield uri
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise OSError(f"{uri}: {error}") from error


def upload(file: Path, target: epath.Path) -> None:
    """One object from a local file, streamed; it appears when all of it has come and its MD5 fits."""
    with _plain_errors(target) as uri:
        cloud().put_file(str(file), uri, consistency="md5")


def _fetched(source: epath.Path) -> Path:
    """A local copy of the object as it is now."""
    uri = os.fspath(source)
    folder = cache_folder() / "objects" / hashlib.sha256(uri.encode()).hexdigest()[:32]
    for _ in range(3):  # the object may be replaced while it is being read
        with _plain_errors(source):
            info = cloud().info(uri)
        if info["type"] != "file":
            raise FileNotFoundError(f"{uri}: no such object")
        version = f"{info.get('generation')}/{info['size']}/{info.get('etag')}"
        file = folder / f"{hashlib.sha256(version.encode()).hexdigest()[:32]}.npy"
        if file.exists() and file.stat().st_size == info["size"]:
            return file
        with contextlib.suppress(_Damaged), _replacing(epath.Path(file)) as temporary:
            with _plain_errors(source):
                cloud().get_file(uri, str(temporary))
            _require_same(temporary, info)
        if file.exists():
            for other in folder.glob("*.npy"):  # versions gone by; a map of one stays readable after the unlink
                if other != file:
                    other.unlink(missing_ok=True)
            return file
    raise ValueError(f"{uri}: three downloads were not what the object's size and MD5 say; try again")


class _Damaged(Exception):
    """A download that is not its object."""


def _require_same(file: Path, info: dict[str, Any]) -> None:
    if file.stat().st_size != int(info["size"]):
        raise _Damaged
    if wanted := info.get("md5Hash"):  # objects composed of others have none
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "md5").digest() != base64.b64decode(wanted):
                raise _Damaged
