"""Files, local and `gs://`: the one place that renames, appends, maps memory or locks.

Names are `etils.epath` paths, and a caller reads, lists and makes folders with their methods. What object storage does
otherwise than a disk stands here: an object is written whole or not at all, cannot be renamed, appended to or mapped,
and knows no locks.
"""

from deepseek_jax.storage.files import (
    AnyPath,
    cache_folder,
    is_local,
    list_files,
    make_folder,
    map_array,
    new_file,
    path,
    read_bytes,
    remove_tree,
    save_array,
    sha256_file,
    write_atomic,
)
from deepseek_jax.storage.lines import LineFile
from deepseek_jax.storage.lock import RunLock
from deepseek_jax.storage.parts import PartReader

__all__ = [
    "AnyPath",
    "LineFile",
    "PartReader",
    "RunLock",
    "cache_folder",
    "is_local",
    "list_files",
    "make_folder",
    "map_array",
    "new_file",
    "path",
    "read_bytes",
    "remove_tree",
    "save_array",
    "sha256_file",
    "write_atomic",
]
