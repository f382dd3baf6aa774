"""Files on a disk and on an object store that is no POSIX: whole or absent, never renamed, appended to or mapped."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import storage
from deepseek_jax.checkpoint import Store
from deepseek_jax.metrics import JsonlWriter, loss_curve, read_jsonl, write_manifest
from deepseek_jax.storage import lines

pytest_plugins = ["fake_gcs"]


@pytest.fixture(params=["local", "gs"])
def root(request, tmp_path):
    """A folder's name, of either kind."""
    if request.param == "local":
        return str(tmp_path / "root")
    request.getfixturevalue("gcs")
    return "gs://bucket/root"


# Whole files


def test_what_is_written_is_read(root):
    text = storage.write_atomic(f"{root}/sub/a.txt", "höh\r\n")
    assert os.fspath(text) == f"{root}/sub/a.txt" and text.read_bytes() == "höh\r\n".encode()
    data = storage.write_atomic(storage.path(root) / "b", bytes(range(256)))
    assert storage.read_bytes(data) == bytes(range(256))
    assert storage.read_bytes(data, 3, 6) == b"\x03\x04\x05" and storage.read_bytes(data, 250, 999)[-1] == 255
    assert storage.sha256_file(data) == "40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880"
    storage.write_atomic(data, b"new")
    assert data.read_text() == "new"
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{root}/none")
    with pytest.raises(FileNotFoundError):
        storage.sha256_file(f"{root}/none")


def test_lists_and_deletes(root):
    names = [f"{root}/run/{i}/x" for i in range(20)]
    for name in (*names, f"{root}/running"):
        storage.write_atomic(name, name)
    assert [os.fspath(file) for file in storage.list_files(f"{root}/run")] == sorted(names)
    assert storage.list_files(f"{root}/none") == []
    storage.remove_tree(f"{root}/run/3/x")
    assert len(storage.list_files(f"{root}/run")) == 19
    for _ in range(2):
        storage.remove_tree(f"{root}/run")
    assert [file.name for file in storage.list_files(root)] == ["running"]


def test_an_empty_folder_stays(root):
    folder = storage.make_folder(f"{root}/a/b")
    assert storage.make_folder(folder) == folder
    storage.write_atomic(folder / "c", "x").unlink()
    assert folder.is_dir() and storage.list_files(folder) == []


@pytest.mark.parametrize("array", [np.arange(12, dtype=np.uint16).reshape(3, 4), np.zeros((0, 3)), np.array(7.5)])
def test_arrays_are_mapped(root, array):
    file = storage.save_array(f"{root}/cache/x.npy", array)
    mapped = storage.map_array(file)
    assert isinstance(mapped, np.memmap) and mapped.dtype == array.dtype and not mapped.flags.writeable
    np.testing.assert_array_equal(mapped, array)


@pytest.mark.parametrize(
    "spoil", [lambda data: data[:-1], lambda data: data[:50], lambda data: b"", lambda data: b"PK"]
)
def test_arrays_cut_short_are_refused(root, spoil):
    file = storage.save_array(f"{root}/x.npy", np.arange(100))
    storage.write_atomic(file, spoil(storage.read_bytes(file)))
    with pytest.raises(ValueError, match="x.npy"):
        storage.map_array(file)


def test_a_stream_gives_a_whole_file_or_none(root):
    with storage.new_file(f"{root}/a") as stream:
        stream.write(b"ab")
        assert not storage.path(f"{root}/a").exists()
        stream.write(b"cd")
    assert storage.read_bytes(f"{root}/a") == b"abcd"
    with pytest.raises(KeyError), storage.new_file(f"{root}/a") as stream:
        stream.write(b"ef")
        raise KeyError
    assert storage.read_bytes(f"{root}/a") == b"abcd" and len(storage.list_files(root)) == 1


def test_parts_of_files(root):
    data = bytes(range(256)) * 64
    file = storage.write_atomic(f"{root}/a", data)
    with storage.PartReader() as reader:
        for start, end, whole in ((0, 10, True), (4097, 9001, False), (5, 5, True), (16000, 16384, True)):
            part = reader.read(file, start, end, whole=whole)
            assert bytes(part) == data[start:end]
        with pytest.raises(ValueError, match="has changed while it was being read"):
            reader.read(file, 16000, 16385 + 4096)
    assert bytes(part) == data[16000:]  # a part outlives its reader


def test_an_array_of_objects_is_refused(root):
    with pytest.raises(ValueError, match="allow_pickle=False"):
        storage.save_array(f"{root}/x.npy", np.array([{}]))
    assert storage.list_files(root) == []


def test_a_mapped_object_is_fetched_once_and_checked(gcs):
    def fetches():
        return sum("alt=media" in request or request.startswith("GET /download") for request in gcs.requests)

    file = storage.save_array("gs://bucket/x.npy", np.arange(1000))
    first = storage.map_array(file)
    assert fetches() == 1
    storage.map_array(file)
    assert fetches() == 1
    storage.save_array(file, np.arange(1000) + 1)
    np.testing.assert_array_equal(storage.map_array(file), np.arange(1000) + 1)
    np.testing.assert_array_equal(first, np.arange(1000), err_msg="a map stays when its object is replaced")
    [copy] = (storage.cache_folder() / "objects").glob("*/*")
    copy.write_bytes(copy.read_bytes()[:-8])  # a full disk
    assert storage.map_array(file)[-1] == 1000 and fetches() == 3

    class Rotten(type(gcs.objects["x.npy"])):
        def metadata(self, bucket, name):
            return super().metadata(bucket, name) | {"md5Hash": "AAAAAAAAAAAAAAAAAAAAAA==", "etag": "other"}

    gcs.objects["x.npy"].__class__ = Rotten
    with pytest.raises(ValueError, match="three downloads were not what"):
        storage.map_array(file)


def test_an_upload_that_breaks_off_leaves_the_old_object(gcs):
    storage.write_atomic("gs://bucket/a", "old")
    large = np.zeros(6 * 2**20, np.uint8)  # sent in another way than small ones
    for write in (
        lambda: storage.write_atomic("gs://bucket/a", "new"),
        lambda: storage.save_array("gs://bucket/a", large),
    ):
        gcs.fail_uploads = 1
        with pytest.raises(OSError, match="^gs://bucket/a: "):
            write()
        assert storage.read_bytes("gs://bucket/a") == b"old"
    storage.save_array("gs://bucket/a", large)
    np.testing.assert_array_equal(storage.map_array("gs://bucket/a"), large)


def test_readers_never_see_half_a_file(root):
    contents = [b"a" * 300_000, b"b" * 200_000]
    storage.write_atomic(f"{root}/x", contents[0])
    ended = threading.Event()

    def write():
        while not ended.is_set():
            for content in contents:
                storage.write_atomic(f"{root}/x", content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            assert storage.read_bytes(f"{root}/x") in contents
            assert [file.name for file in storage.list_files(root)] == ["x"]
    finally:
        ended.set()
        writer.join()


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    storage.write_atomic(tmp_path / "x", "old")
    program = """
import os, signal, sys
from deepseek_jax import storage
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
storage.write_atomic(sys.argv[1], "new" * 1000)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "x")], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "x").read_text() == "old"
    assert [file.name for file in storage.list_files(tmp_path)] == ["x"], "what it left is no file of anyone's"


def test_wrong_paths():
    assert storage.is_local("/a/b") and not storage.is_local("gs://a/b")
    assert storage.path("~/x") == storage.path(os.path.expanduser("~/x"))
    with pytest.raises(ValueError, match="give a local path or a gs:// one"):
        storage.path("s3://bucket/run")
    with pytest.raises(ValueError, match=r"pathlib.Path drops a slash of gs://"):
        storage.path("gs:/bucket/run")


def test_without_gcsfs_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for use in (storage.path, storage.map_array, lambda p: storage.write_atomic(p, "x"), storage.RunLock):
        with pytest.raises(ValueError, match=r"gs:// needs gcsfs: pip install 'deepseek-jax\[gcs\]'"):
            use("gs://bucket/run")


def test_importing_is_light():
    program = (
        "import sys; import deepseek_jax.storage; assert not {'jax', 'fsspec', 'gcsfs', 'orbax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)


def test_the_fake_is_no_posix(gcs):
    file = storage.write_atomic("gs://bucket/a", "text")
    with pytest.raises(Exception, match="cannot do that"):  # gcsfs has an error of its own
        file.rename("gs://bucket/b")
    assert gcs.refused and set(gcs.objects) == {"a"}
    gcs.refused.clear()


# Lines


def test_lines(root):
    with storage.LineFile(f"{root}/m.txt", ["kept"]) as file:
        file.write("é")
        with pytest.raises(ValueError, match="holds no newline"):
            file.write("a\nb")
        file.flush()
        assert storage.read_bytes(f"{root}/m.txt") == "kept\né\n".encode()
        file.write("last")
    file.close()
    assert storage.read_bytes(f"{root}/m.txt") == "kept\né\nlast\n".encode()
    storage.LineFile(f"{root}/m.txt").close()
    assert storage.read_bytes(f"{root}/m.txt") == b""


def test_lines_of_a_disk_are_there_at_once(tmp_path):
    with storage.LineFile(tmp_path / "m.txt") as file:
        file.write("a")
        assert (tmp_path / "m.txt").read_text() == "a\n"


def test_lines_of_an_object_cost_a_bounded_share_of_the_time(gcs, monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr(lines.time, "monotonic", lambda: clock[0])
    sent = []

    def upload(local, target):
        clock[0] += 1e-5 * local.stat().st_size  # 100 kB/s
        sent.append(clock[0])
        if len(sent) == 2:
            raise OSError("no network")

    monkeypatch.setattr(lines, "upload", upload)
    with storage.LineFile("gs://bucket/m.txt") as file:
        for _ in range(3600):
            clock[0] += 1
            file.write("x" * 999)
    last = sent[-1] - sent[-2]
    assert clock[0] - last < 3600 * (1 + 1.3 / file.PATIENCE) and len(sent) < 100
    assert "no network" in caplog.text, "one that failed is made up for by the next"


def test_metrics_manifest_and_pictures(root):
    def run(first, last, **options):
        with JsonlWriter(f"{root}/metrics.jsonl", **options) as writer:
            for step in range(first, last):
                writer.write({"step": step, "loss": 1 / (1 + step)})

    run(0, 5)
    run(3, 9, resume_step=2)
    records = read_jsonl(f"{root}/metrics.jsonl")
    assert [record["step"] for record in records] == list(range(9))
    write_manifest(root, {"steps": 3})
    write_manifest(root, {"steps": 9})
    manifest = json.loads(storage.read_bytes(f"{root}/manifest.json"))
    assert [start["config"]["steps"] for start in manifest["runs"]] == [3, 9]
    picture = loss_curve(f"{root}/metrics.jsonl", f"{root}/plots/loss.png")
    assert storage.read_bytes(picture, 0, 4) == b"\x89PNG"


# Checkpoints


class Position:
    """A data iterator, as far as the store needs one."""

    def __init__(self, at: int):
        self.at = at

    def get_state(self) -> dict:
        return {"at": self.at}

    def set_state(self, state: dict) -> None:
        self.at = state["at"]


def test_checkpoints_on_an_object_store(gcs):
    state = {"w": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones((2,), jnp.bfloat16), "key": jax.random.key(3)}
    abstract = jax.eval_shape(lambda: state)
    for name in ("run/checkpoints/9/state/manifest.ocdbt", "run/checkpoints/9/meta/metadata"):
        gcs.put(name, b"{}")  # a killed save
    storage.make_folder("gs://bucket/run/checkpoints")  # Orbax clears the killed save away, and then lists
    with Store("gs://bucket/run/checkpoints", keep=2) as store:
        assert store.latest() is None
        for step in (1, 2, 3):
            assert store.save(step, state, Position(step), meta={"tokens": step})
        assert store.steps() == [2, 3]
    with Store("gs://bucket/run/checkpoints", read_only=True) as store:
        restored, meta = store.restore(abstract, position := Position(0))
    assert meta == {"tokens": 3} and position.at == 3
    for name, leaf in state.items():
        raw = [jax.random.key_data(x) if name == "key" else x for x in (leaf, restored[name])]
        assert raw[0].dtype == raw[1].dtype and np.asarray(raw[0]).tobytes() == np.asarray(raw[1]).tobytes()
    assert not any(name.startswith(("run/checkpoints/1/", "run/checkpoints/9/")) for name in gcs.objects)
