"""Writers beside metrics.jsonl: TensorBoard's files read back, W&B by a stub, one's own; progress' time left."""

import io
import logging
import math
import struct
import sys
import types

import numpy as np
import pytest

from deepseek_jax.metrics import progress as progress_module
from deepseek_jax.metrics.adapters import open_writers, scalars
from deepseek_jax.metrics.progress import Progress

CONFIG = {"model": {"ffn": {"type": "MoE", "first_k_dense_replace": 3}}, "steps": 10}
LINE = {
    "tokens": 100,
    "loss": np.float32(2.5),
    "loss_mtp_by_depth": [3.0, 4.0],
    "grad_norm": math.nan,
    "note": "text",
    "absent": None,
    "held_out": {"web": {"loss": 2.0}},
    "router": {
        "moe_layers": {"load": [[1.0, 3.0], [2.0, 2.0]], "max_violation": [0.5, 0.0]},
        "mtp": {"max_violation": [0.25]},
    },
}


def test_scalars_are_flat():
    flat = scalars(LINE, first_layer=3)
    assert math.isnan(flat.pop("grad_norm"))
    assert flat == {
        "tokens": 100.0,
        "loss": 2.5,
        "loss_mtp_by_depth/1": 3.0,
        "loss_mtp_by_depth/2": 4.0,
        "loss_mtp_by_depth/mean": 3.5,
        "held_out/web/loss": 2.0,
        "router/moe_layers/max_violation/layer_03": 0.5,
        "router/moe_layers/max_violation/layer_04": 0.0,
        "router/moe_layers/max_violation/mean": 0.25,
        "router/mtp/max_violation/depth_1": 0.25,
        "router/mtp/max_violation/mean": 0.25,
    }
    assert scalars({"a": ["x"], "b": [[1], [1, 2]], "c": [math.inf], "d": [], "e": True}) == {"c/1": math.inf, "e": 1.0}


def events(folder) -> list:
    """The events of a folder's files: records of length, its checksum, data, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_files_hold_the_line(tmp_path):
    [writer] = open_writers(["tensorboard"], tmp_path / "run", CONFIG)
    writer.write(5, LINE)
    writer.write(6, {"loss": 2.25})
    writer.close()
    [resumed] = open_writers(["tensorboard"], tmp_path / "run", CONFIG, resume_step=5)
    resumed.write(6, {"loss": 2.125})
    resumed.close()
    values = [(e.step, v.tag, v.simple_value) for e in events(tmp_path / "run/tensorboard") for v in e.summary.value]
    assert (5, "loss", 2.5) in values and (6, "loss", 2.25) in values and (6, "loss", 2.125) in values
    assert (5, "router/moe_layers/max_violation/layer_03", 0.5) in values
    assert [math.isnan(value) for _, tag, value in values if tag == "grad_norm"] == [True]
    purged = [e.step for e in events(tmp_path / "run/tensorboard") if e.session_log.status == 1]
    assert sorted(purged) == [0, 6], "a new start takes back all, a resumed one what it does again"


def stub_wandb(monkeypatch):
    """A module that keeps what it is told."""
    calls = []

    class Run:
        def __init__(self, id):
            self.id = id or "drawn"

        def define_metric(self, *args, **options):
            calls.append(("define", args, options))

        def log(self, values):
            calls.append(("log", values))

        def finish(self):
            calls.append(("finish",))

    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace()
    module.init = lambda **options: calls.append(("init", options)) or Run(options["id"])
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_is_told_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    calls = stub_wandb(monkeypatch)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    [writer] = open_writers(["wandb"], tmp_path, CONFIG)
    writer.write(7, LINE)
    writer.close()
    started = calls[0][1]
    assert (started["project"], started["name"], started["config"]) == ("mine", tmp_path.name, CONFIG)
    assert started["id"] is None and started["resume"] is None
    [logged] = [call[1] for call in calls if call[0] == "log"]
    assert logged["step"] == 7 and logged["router/moe_layers/max_violation/layer_04"] == 0.0
    assert calls[-1] == ("finish",)
    open_writers(["wandb"], tmp_path, CONFIG, resume_step=7)
    again = [call[1] for call in calls if call[0] == "init"][-1]
    assert (again["id"], again["resume"]) == ("drawn", "allow")
    open_writers(["wandb"], tmp_path, CONFIG)
    assert [call[1] for call in calls if call[0] == "init"][-1]["id"] is None, "a new run is no continuation"


MADE = []


class Own:
    def __init__(self, run_dir, config):
        self.lines, self.closed = [], 0
        MADE.append((self, run_dir.name, config))

    def write(self, step, values):
        if values.get("loss") == 0:
            raise OSError("no route to host")
        self.lines.append((step, values))

    def close(self):
        self.closed += 1


def broken(run_dir, config):
    raise RuntimeError("no login")


def test_a_writer_of_ones_own_gets_the_line_as_it_is(tmp_path):
    MADE.clear()
    [writer] = open_writers([f"{__name__}:Own"], tmp_path, CONFIG)
    writer.write(1, LINE)
    writer.close()
    [(own, folder, config)] = MADE
    assert own.lines == [(1, LINE)] and own.closed == 1
    assert folder == tmp_path.name and config == CONFIG


def test_a_writer_that_fails_does_not_end_the_run(tmp_path, caplog):
    [writer] = open_writers([f"{__name__}:Own"], tmp_path, CONFIG)
    with caplog.at_level(logging.WARNING):
        for step, loss in enumerate([1, 0, 0, 1, 0]):
            writer.write(step, {"loss": loss})
    assert [step for step, _ in MADE[-1][0].lines] == [0, 3]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "failed at step 1: OSError('no route to host')" in said[0], "once a stretch"


def wrong(run_dir, config):
    return print


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("tensorbord", "'tensorbord' is none of 'tensorboard', 'wandb' or 'package.module:factory'"),
        ("no_such_module:f", "'no_such_module:f' cannot be opened (ModuleNotFoundError"),
        (f"{__name__}:nothing", "cannot be opened (AttributeError"),
        (f"{__name__}:broken", "cannot be opened (RuntimeError: no login)"),
        ("builtins:dict.fromkeys", "cannot be opened (AttributeError"),
        ("os.path:join", "cannot be opened (TypeError"),
        (f"{__name__}:wrong", "it needs write(step, values) and close()"),
    ],
)
def test_wrong_writers_are_refused_and_the_others_closed(tmp_path, name, error):
    MADE.clear()
    with pytest.raises(ValueError) as refused:
        open_writers([f"{__name__}:Own", name], tmp_path, CONFIG)
    assert error in str(refused.value)
    assert [own.closed for own, *_ in MADE] == ([] if "is none of" in error else [1])


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch, name, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"'{name}' needs {package}: pip install 'deepseek-jax\\[{name}\\]'"):
        open_writers([name], tmp_path, CONFIG)


def test_time_left_goes_by_the_latest_steps(monkeypatch):
    """The first stretch compiles for 100 s; after it a step takes 2 s."""
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(total=1000, stream=stream, log_seconds=0)
    for step, now[0] in [(10, 120.0), (20, 140.0), (30, 160.0)]:
        progress.update(step)
    left = [line.split("left ")[1] for line in stream.getvalue().splitlines()]
    assert left == ["3:18:00", "0:32:40", "0:32:20"]
    long = Progress(total=10**6, stream=stream, log_seconds=0)
    now[0] += 10.0
    long.update(1)
    assert stream.getvalue().endswith("left 115 d 17 h\n")
