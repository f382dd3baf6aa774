"""What disks and kills do to checkpoints: every flipped bit, cut file and lost file is found before it is restored."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.checkpoint import digests
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.data.pipeline import TokenSource, batches

WIDTH = 3000


def make_state(step):
    return {"w": jnp.arange(WIDTH, dtype=jnp.float32) + step, "n": jnp.int32(step)}


ABSTRACT = {"w": jax.ShapeDtypeStruct((WIDTH,), jnp.float32), "n": jax.ShapeDtypeStruct((), jnp.int32)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two good steps, 3 and 7, with a data iterator."""
    folder = tmp_path_factory.mktemp("saved")
    with Store(folder) as store:
        for step in (3, 7):
            store.save(step, make_state(step), batches(TokenSource(np.arange(100), 8), 4, seed=0), {"step": step})
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def good(folder, verify="full"):
    said = []
    with Store(folder, read_only=True) as store:
        return store.latest_good(verify, said.append), said


def files_of(folder, step=7):
    return sorted(file.relative_to(folder).as_posix() for file in (folder / str(step)).rglob("*") if file.is_file())


def test_good_steps_verify(copy):
    assert good(copy) == (7, []) and good(copy, "sampled") == (7, []) and good(copy, "off") == (7, [])
    assert digests.problems(copy / "7", "full") == []
    listed = json.loads((copy / "7" / "sha256.0.json").read_text())["files"]
    assert {f"7/{name}" for name in listed} | {"7/sha256.0.json"} == set(files_of(copy))


def test_every_flipped_bit_is_found_and_the_step_before_is_taken(copy):
    draw = np.random.default_rng(0)
    for name in files_of(copy):
        file = copy / name
        before = file.read_bytes()
        if not before:
            continue
        content = bytearray(before)
        content[draw.integers(len(content))] ^= 1 << int(draw.integers(8))
        file.write_bytes(content)
        step, said = good(copy)
        assert step == 3 and "7 is passed over" in said[0], name
        file.write_bytes(before)
    with Store(copy) as store:
        state, meta = store.restore(ABSTRACT, step=3)
    np.testing.assert_array_equal(state["w"], make_state(3)["w"])
    assert meta == {"step": 3}


@pytest.mark.parametrize("verify", ["full", "sampled"])
def test_cut_and_lost_files_are_found(copy, verify):
    for name in files_of(copy):
        file = copy / name
        before = file.read_bytes()
        if before:
            file.write_bytes(before[: len(before) // 2])
            assert good(copy, verify)[0] == 3, name
        file.unlink()
        assert good(copy, verify)[0] == 3, name
        file.write_bytes(before)
    assert good(copy, verify)[0] == 7
    shutil.rmtree(copy / "7" / "data")  # the whole data iterator
    assert good(copy, verify)[0] == 3


def test_empty_and_foreign_manifests_are_damage(copy):
    manifest = copy / "7" / "sha256.0.json"
    for content in ("", "{}", "[]", '{"files": {}}', "null"):
        manifest.write_text(content)
        assert good(copy)[0] == 3, content
    (copy / "7" / "state" / "extra").write_bytes(b"not ours")
    assert good(copy)[0] == 3


def test_a_first_save_cut_off_before_its_manifest_counts_as_none(copy):
    """A kill leaves one step without; where more lack theirs, something else took them, and nothing is begun anew."""
    (copy / "7" / "sha256.0.json").unlink()
    assert good(copy)[0] == 3
    (copy / "3" / "sha256.0.json").unlink()
    with pytest.raises(ValueError, match="no good checkpoint .*the save was cut off"):
        good(copy)
    shutil.rmtree(copy / "3")
    step, said = good(copy)
    assert step is None and len(said) == 1 and "the save was cut off" in said[0]


def test_damage_inside_a_manifest_is_damage(copy):
    manifest = copy / "7" / "sha256.0.json"
    before = manifest.read_text()
    for old, new in (("size", "sizd"), ("sha256", "sha257"), ('"processes": 1', '"processes": 3'), ("files", "filez")):
        manifest.write_text(before.replace(old, new))
        assert good(copy)[0] == 3, new


def test_a_disk_that_does_not_answer_is_no_damage(copy, monkeypatch):
    (copy / "7" / "sha256.0.json").unlink()

    def unreachable(self, step):
        raise ConnectionResetError("connection reset")

    monkeypatch.setattr(Store, "_note", unreachable)
    with pytest.raises(ConnectionResetError):
        good(copy)


def test_nothing_but_damage_is_an_error_that_names_it(copy):
    for step in (3, 7):
        [data, *_] = [name for name in files_of(copy, step) if "/state/" in name]
        (copy / data).write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no good checkpoint \(step 7: state/.*; step 3: state/"):
        good(copy)


def test_steps_saved_without_manifests_restore(tmp_path):
    with Store(tmp_path, manifests=False) as store:
        store.save(1, make_state(1))
    assert not list(tmp_path.rglob("sha256*")) and good(tmp_path) == (1, [])


def test_sampling_looks_at_sizes_of_all_and_content_of_some(tmp_path):
    for i in range(64):
        (tmp_path / f"big{i}").write_bytes(bytes(digests._SMALL))
    digests.write(tmp_path, 0, 1)
    (tmp_path / "big7").write_bytes(b"x" * digests._SMALL)
    assert digests.problems(tmp_path, "full") == ["big7: its content has changed (SHA-256)"]
    found = [digests.problems(tmp_path, "sampled", seed) for seed in range(40)]
    assert 0 < sum(map(bool, found)) < 20
    (tmp_path / "big7").write_bytes(b"x")
    assert all(digests.problems(tmp_path, "sampled", seed) for seed in range(10))


def test_each_process_hashes_its_own_files(tmp_path):
    for name in ("state/ocdbt.process_0/d/a", "state/ocdbt.process_1/d/b", "state/d/c", "data/process_1-of-2.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    digests.write(tmp_path, 0, 2)
    assert digests.cut_off(tmp_path)
    digests.write(tmp_path, 1, 2)
    assert not digests.cut_off(tmp_path) and digests.problems(tmp_path, "full") == []
    listed = [set(json.loads((tmp_path / f"sha256.{i}.json").read_text())["files"]) for i in (0, 1)]
    assert listed == [
        {"state/ocdbt.process_0/d/a", "state/d/c"}, {"state/ocdbt.process_1/d/b", "data/process_1-of-2.json"},
    ]  # fmt: skip


@contextlib.contextmanager
def full_disk(size=200_000):
    """Files can grow to `size` bytes: a write past it fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_save_is_told_and_leaves_the_others(tmp_path):
    state = {"w": jax.random.normal(jax.random.key(0), (1_000_000,))}
    with Store(tmp_path, keep=5) as store:
        store.save(1, state)
        store.wait()
        with full_disk(), pytest.raises((OSError, ValueError), match="(?i)file too large|exhausted|w"):
            store.save(2, state)
            store.wait()
        assert store.steps() == [1] and store.latest_good() == 1
        store.save(2, state)
        assert store.latest_good() == 2


KILLED = textwrap.dedent(
    """
    import sys
    import jax.numpy as jnp
    from deepseek_jax.checkpoint.store import Store
    with Store(sys.argv[1], keep=3) as store:
        first = (store.latest_good(say=lambda text: None) or 0) + 1
        print("ready", first, flush=True)
        for step in range(first, first + 1000):
            store.save(step, {"w": jnp.full(2_000_000, step, jnp.float32)})
    """
)


def killed_saves(folder, delays):
    """Kills a process that only saves, after each of the delays (seconds), and checks what stays each time."""
    reached = 0
    for delay in delays:
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        words = process.stdout.readline().split()
        assert words[:1] == ["ready"] and int(words[1]) > reached, "a restart goes on from the last good step"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with Store(folder, read_only=True) as store:
            step = store.latest_good(say=lambda text: None)
            if step is not None:
                state, _ = store.restore({"w": jax.ShapeDtypeStruct((2_000_000,), jnp.float32)}, step=step)
                assert (np.asarray(state["w"]) == step).all()
        assert (step or 0) >= reached
        reached = step or 0
    return reached


def test_killed_at_any_moment_of_a_save(tmp_path):
    """3 moments; `make studies` asks for 20."""
    delays = np.random.default_rng(3).uniform(0.2, 1.0, int(os.environ.get("DEEPSEEK_JAX_KILLS", "3")))
    assert killed_saves(tmp_path, delays) > 0
