"""What a run writes about itself: numbers that read back exactly, one unbroken file, pictures, the manifest."""

import io
import json
import math
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.metrics import (
    JsonlWriter,
    Progress,
    loss_curve,
    manifest,
    read_jsonl,
    router_heatmap,
    write_manifest,
)

# Lines


def test_numbers_read_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    singles = rng.integers(0, 2**32, 2000, dtype=np.uint32).view(np.float32)
    singles = singles[np.isfinite(singles)]
    doubles = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0]
    halves = jnp.asarray(rng.normal(size=50), jnp.bfloat16)
    with JsonlWriter(tmp_path / "run" / "metrics.jsonl") as writer:
        writer.write({"step": 1, "singles": singles, "doubles": doubles, "halves": halves, "loss": singles[0]})
    [record] = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    np.testing.assert_array_equal(np.array(record["singles"], np.float32).view(np.uint32), singles.view(np.uint32))
    assert [struct.pack("d", x) for x in record["doubles"]] == [struct.pack("d", x) for x in doubles]
    np.testing.assert_array_equal(jnp.asarray(record["halves"], jnp.bfloat16), halves)
    assert record["loss"] == float(singles[0])


def test_kinds_of_values(tmp_path):
    record = {
        "step": jnp.int32(3),
        "router": {"moe_layers": {"load": jnp.ones((2, 2)), "dropped": (0.5, np.float64(0.25))}},
        "bad": [math.nan, math.inf, -math.inf, jnp.float32(jnp.nan)],
        "note": "spike",
        "skipped": np.bool_(True),
        "absent": None,
    }
    with JsonlWriter(tmp_path / "m.jsonl") as writer:
        writer.write(record)
    text = (tmp_path / "m.jsonl").read_text()
    assert '"bad": ["NaN", "Infinity", "-Infinity", "NaN"]' in text, "strict JSON has no NaN"
    [read] = read_jsonl(tmp_path / "m.jsonl")
    assert read["step"] == 3 and type(read["step"]) is int
    assert read["router"] == {"moe_layers": {"load": [[1.0, 1.0], [1.0, 1.0]], "dropped": [0.5, 0.25]}}
    assert math.isnan(read["bad"][0]) and read["bad"][1:3] == [math.inf, -math.inf]
    assert (read["note"], read["skipped"], read["absent"]) == ("spike", True, None)


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"loss": 1.0}, "step=None: a metric line needs"),
        ({"step": 1.5}, "step=1.5"),
        ({"step": 1, "router": {"load": object()}}, "router.load=<object"),
    ],
)
def test_wrong_records_are_refused_and_leave_no_trace(tmp_path, record, error):
    with JsonlWriter(tmp_path / "m.jsonl") as writer:
        with pytest.raises(ValueError, match=error):
            writer.write(record)
        writer.write({"step": 1})
    assert read_jsonl(tmp_path / "m.jsonl") == [{"step": 1}]


def test_each_line_is_on_its_way_at_once(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write({"step": 1})
    assert read_jsonl(tmp_path / "m.jsonl") == [{"step": 1}]
    writer.close()


def test_a_resumed_file_reads_as_one_unbroken_run(tmp_path):
    def run(path, first, last, **options):
        with JsonlWriter(path, **options) as writer:
            for step in range(first, last + 1):
                writer.write({"step": step, "loss": 1 / (step + 1)})
                if step % 4 == 0:
                    writer.write({"step": step, "held_out_loss": 2 / (step + 1)})

    run(tmp_path / "unbroken.jsonl", 0, 12)
    broken = tmp_path / "broken.jsonl"
    run(broken, 0, 9)
    with broken.open("a") as file:
        file.write('{"step": 10, "lo')  # killed within a line
    assert read_jsonl(broken)[-1]["step"] == 9
    run(broken, 7, 12, resume_step=6)
    assert broken.read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()
    run(broken, 0, 1)
    assert [record["step"] for record in read_jsonl(broken)] == [0, 0, 1], "a new run begins a new file"


def test_a_broken_line_within_the_file_is_an_error(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"m.jsonl, line 2: not JSON"):
        JsonlWriter(tmp_path / "m.jsonl", resume_step=3)
    (tmp_path / "m.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match="line 1: a metric line is an object with an int 'step'"):
        read_jsonl(tmp_path / "m.jsonl")


# Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_in_a_log_is_a_line_now_and_then():
    stream = io.StringIO()
    with Progress(total=100, initial=90, stream=stream, log_seconds=3600) as progress:
        for step in range(91, 101):
            progress.update(step, {"loss": 1.23456, "tok/s": 12345.6})
        progress.message("done")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and "\r" not in stream.getvalue()
    assert lines[0].startswith("train step 91/100  loss 1.235  tok/s 12,346  left 0:00:00")
    assert lines[1:] == ["train step 100/100  loss 1.235  tok/s 12,346", "done"]


def test_progress_on_a_terminal_is_a_bar():
    stream = Terminal()
    progress = Progress(total=10, initial=5, stream=stream)
    progress.message("before the loop")
    assert stream.getvalue() == "before the loop\n", "a bar that no loop has begun"
    with progress:
        progress.update(10, {"loss": 1.5})
    assert "10/10" in stream.getvalue() and "loss 1.5" in stream.getvalue() and "\r" in stream.getvalue()


def test_progress_may_be_silent():
    stream = Terminal()
    with Progress(total=2, stream=stream, shown=False) as progress:
        progress.update(2, {"loss": 1.0})
        progress.message("text")
    assert stream.getvalue() == ""


# Pictures


def lines_of_a_run(steps=30):
    rng = np.random.default_rng(0)
    for step in range(steps):
        load = {"moe_layers": rng.dirichlet(np.full(8, 2 + step), size=2), "mtp": rng.dirichlet(np.full(8, 5), size=1)}
        record = {
            "step": step,
            "tokens": step * 1000,
            "loss": 3 + 5 * math.exp(-step / 9),
            "loss_main": 2 + 5 * math.exp(-step / 9),
            "loss_mtp": [3 + 5 * math.exp(-step / 9)],
            "loss_balance": 1e-4,
            "router": {name: {"load": x, "max_violation": x.max(1) / x.mean(1) - 1} for name, x in load.items()},
        }
        if step % 10 == 0:
            record |= {"held_out_loss": record["loss_main"] + 0.1, "held_out_bits_per_byte": record["loss_main"] / 2.4}
        yield record


def size_of_png(path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return struct.unpack(">II", header[16:24])


def test_pictures_from_a_file(tmp_path):
    with JsonlWriter(tmp_path / "metrics.jsonl") as writer:
        for record in lines_of_a_run():
            writer.write(record)
    curve = loss_curve(tmp_path / "metrics.jsonl", tmp_path / "plots" / "loss.png")
    heatmap = router_heatmap(tmp_path / "metrics.jsonl", tmp_path / "plots" / "router.png", first_layer=1)
    assert size_of_png(curve)[0] == size_of_png(heatmap)[0] == 1200
    assert router_heatmap(np.ones((58, 256)), tmp_path / "large.png").exists()


def texts(figure) -> list[str]:
    import matplotlib.text

    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def test_pictures_show_what_the_lines_say(tmp_path, monkeypatch):
    from deepseek_jax.metrics import plots

    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    records = list(lines_of_a_run())
    loss_curve(records, "unused.png")
    router_heatmap(records, "unused.png", first_layer=1)
    curve, heatmap = figures
    lines = {line.get_label(): line for line in curve.axes[0].lines}
    assert set(lines) == {
        "train, all parts",
        "train, next token",
        "train, multi-token prediction",
        "held out, next token",
    }
    assert lines["train, next token"].get_ydata().tolist() == [record["loss_main"] for record in records]
    assert lines["held out, next token"].get_xdata().tolist() == [0, 10, 20]
    assert curve.axes[1].lines[0].get_ydata().tolist() == [1e-4] * 30
    first, last = records[0]["held_out_bits_per_byte"], records[20]["held_out_bits_per_byte"]
    assert f"step 29, 29 K tokens, held out {first:.3f} → {last:.3f} bits per byte" in texts(curve)
    assert {"loss (nats per token)", "balance loss", "step"} <= set(texts(curve))

    shown = heatmap.axes[0].images[0].get_array()
    load = np.concatenate([records[-1]["router"][name]["load"] for name in ("moe_layers", "mtp")])
    np.testing.assert_allclose(shown, load * 8, rtol=1e-12)
    assert [label.get_text() for label in heatmap.axes[0].get_yticklabels()] == ["1", "2", "mtp 1"]
    violation = {line.get_label(): line.get_ydata() for line in heatmap.axes[1].lines}
    assert violation["mtp 1"][-1] == records[-1]["router"]["mtp"]["max_violation"][0]
    assert "expert load at step 29" in texts(heatmap)


def test_pictures_need_something_to_draw(tmp_path):
    with pytest.raises(ValueError, match="there are no lines"):
        loss_curve([], tmp_path / "x.png")
    with pytest.raises(ValueError, match="none of 1 lines has a loss"):
        loss_curve([{"step": 1}], tmp_path / "x.png")
    with pytest.raises(ValueError, match="none of 1 lines has a router's load"):
        router_heatmap([{"step": 1, "router": {}}], tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"shape \[3\]: give \[layers, experts\]"):
        router_heatmap(np.ones(3), tmp_path / "x.png")
    assert loss_curve([{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}], tmp_path / "x.png").exists()


def test_drawing_touches_no_global_state(tmp_path):
    program = """
import sys
from deepseek_jax.metrics import loss_curve, router_heatmap
assert not {"matplotlib", "jax"} & set(sys.modules)
import matplotlib
before = matplotlib.rcParams.copy()
loss_curve([{"step": 1, "loss": 2.0}], sys.argv[1])
assert matplotlib.rcParams.copy() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program, str(tmp_path / "x.png")], check=True, timeout=60)


# Manifest


def test_manifest_says_what_ran(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["deepseek-jax", "train", "my config.py"])
    extra = {"seeds": {"model": 0}, "data": {"fingerprint": "ab"}, "mesh": {"data": 8}}
    write_manifest(tmp_path / "run", {"steps": 3}, extra)
    written = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert written["config"] == {"steps": 3} and written["seeds"] == {"model": 0}
    assert written["data"]["fingerprint"] == "ab"
    assert written["packages"]["jax"] == jax.__version__
    assert written["devices"] == {"backend": "cpu", "kind": "cpu", "count": jax.device_count(), "processes": 1}
    assert "device_count=8" in written["environment"]["XLA_FLAGS"]
    assert written["command_line"] == "deepseek-jax train 'my config.py'"
    assert written["started"].endswith("+00:00")


def test_manifest_lists_every_start(tmp_path):
    write_manifest(tmp_path, {"steps": 3}, {"step": 0})
    write_manifest(tmp_path, {"steps": 9}, {"step": 3})
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert written["config"] == {"steps": 9}
    assert [(run["config"]["steps"], run["step"]) for run in written["runs"]] == [(3, 0), (9, 3)]
    assert {name: value for name, value in written.items() if name != "runs"} == written["runs"][-1]


def test_manifest_errors(tmp_path):
    with pytest.raises(ValueError, match=r"names \['config'\] are the manifest's own"):
        write_manifest(tmp_path, {}, {"config": 1})
    with pytest.raises(ValueError, match="JSON cannot hold it"):
        write_manifest(tmp_path, {"lr": math.nan})
    assert not (tmp_path / "manifest.json").exists()
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not a manifest"):
        write_manifest(tmp_path, {})


def test_git_revision_is_that_of_this_code(tmp_path, monkeypatch):
    def git(*arguments):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *settings, *arguments], cwd=tmp_path, check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    (package / "manifest.py").write_text("code")
    monkeypatch.setattr(manifest, "__file__", str(package / "manifest.py"))
    monkeypatch.setattr(manifest, "_DISTRIBUTION", "no-such-distribution")
    assert manifest.git_revision() is None
    git("init")
    git("commit", "--allow-empty", "-m", "a checkout that only contains the environment")
    assert manifest.git_revision() is None
    git("add", ".")
    git("commit", "-m", "the code itself")
    found = manifest.git_revision()
    assert found is not None and len(found["revision"]) == 40 and not found["dirty"]
    (package / "manifest.py").write_text("changed")
    assert manifest.git_revision() == {"revision": found["revision"], "dirty": True}
