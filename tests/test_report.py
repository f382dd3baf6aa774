"""The report: what the page says of runs in every state, that it is closed in itself, that text stays text."""

import html.parser
import json
import math
import re
import subprocess
import sys
import time
from xml.etree import ElementTree

import numpy as np
import pytest

from deepseek_jax.cli import main
from deepseek_jax.metrics.history import read_history
from deepseek_jax.metrics.report import report
from deepseek_jax.metrics.writer import JsonlWriter

MANIFEST = {
    "started": "2026-11-20T10:00:00+00:00",
    "command_line": "deepseek-jax train configs/x.py",
    "python": "3.11.9",
    "packages": {"jax": "0.10.2"},
    "git": {"revision": "d0a3f9cabcdef", "dirty": True},
    "host": {"system": "Linux", "cpu_count": 8},
    "devices": {"backend": "gpu", "kind": "NVIDIA H100", "count": 8, "processes": 1},
    "environment": {},
    "config": {"model": {"name": "deepseek-v3-nano", "ffn": {"type": "MoE", "first_k_dense_replace": 3}}, "steps": 100},
    "mesh": {"data": 8, "tensor": 1},
    "seeds": {"run": 0},
    "from_step": 0,
}


def lines_of_a_run(steps=40, layers=2, experts=8, router=True):
    rng = np.random.default_rng(0)
    for step in range(steps):
        loss = 2 + 5 * math.exp(-step / 9)
        record = {"step": step, "tokens": step * 1000}
        if step:
            record |= {
                "loss": loss + 1, "loss_main": loss, "loss_mtp": loss + 0.5, "loss_balance": 1e-4 / step,
                "grad_norm": 1.0, "learning_rate": 1e-3, "batch_size": 8, "mtp_loss_weight": 0.3,
                "bias_update_speed": 0.001, "tokens_per_second": 1000.0, "mfu": 0.4, "skipped": step // 30,
            }  # fmt: skip
            if router:
                load = {"moe_layers": rng.dirichlet(np.full(experts, 9), layers), "mtp": np.ones((1, experts))}
                record["router"] = {
                    name: {
                        "load": x, "max_violation": x.max(1) / x.mean(1) - 1, "entropy": x.max(1),
                        "dropped": x.min(1), "bias_spread": x.mean(1),
                    }
                    for name, x in load.items()
                }  # fmt: skip
        if step % 10 == 0:
            record |= {"held_out_loss": loss, "held_out_bits_per_byte": loss / 2}
            record["held_out"] = {name: {"loss": loss, "bits_per_byte": loss / 2} for name in ("web", "code")}
        yield record


def make_run(folder, lines=(), manifest=MANIFEST, samples=()):
    folder.mkdir(parents=True, exist_ok=True)
    if manifest is not None:
        (folder / "manifest.json").write_text(json.dumps({**manifest, "runs": manifest.get("runs", [manifest])}))
    with JsonlWriter(folder / "metrics.jsonl") as writer:
        for line in lines:
            writer.write(line)
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


class Page(html.parser.HTMLParser):
    """Titles of cards and sections, texts, and every tag with its attributes; unbalanced tags are an error."""

    VOID = ("meta",)

    def __init__(self, run_dir):
        super().__init__()
        self.source = report(run_dir).read_text()
        self.tags, self.open, self.texts = [], [], []
        self.found = {name: [] for name in ("h1", "h2", "figcaption", "pre", "summary")}
        self.feed(self.source)
        assert not self.open
        for svg in re.findall(r"<svg.*?</svg>", self.source, re.S):
            ElementTree.fromstring(svg)
            assert not re.search(r'"[^"]*\b(nan|inf)\b[^"]*"', re.sub(r"data:[^\"]*", "", svg)), "a place that is none"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        for name in self.found:
            if name in self.open:
                self.found[name].append(data)

    def says(self, *words):
        text = " ".join(" ".join(self.texts).split())
        return all(word in text for word in words)


def test_a_whole_run(tmp_path):
    second = {**MANIFEST, "from_step": 20, "config": {**MANIFEST["config"], "steps": 40}}
    certificate = {"equal": True, "state_sha256": "ab12cd"}
    manifest = {**second, "runs": [MANIFEST, second], "certificate": certificate}
    samples = [
        {"step": 20, "prompt": "old ", "text": "text"},
        {"step": 39, "prompt": "def ", "text": "f(x):\n    pass"},
    ]
    page = Page(make_run(tmp_path / "mine", lines_of_a_run(), manifest, samples))
    assert page.found["h1"] == ["deepseek-v3-nano · mine"]
    assert page.found["h2"] == [
        "Held-out text by source", "Curves", "Routers", "Samples", "Certificate", "Starts", "Configuration",
        "Environment",
    ]  # fmt: skip
    assert page.found["figcaption"] == [
        "Loss (nats per token)", "Held-out bits per byte", "Expert balance loss", "Gradient norm", "Learning rate",
        "Tokens per second", "Model FLOPs utilisation", "Updates left out", "Expert load at step 39", "MaxVio",
        "Routing entropy (nats)", "Dropped share", "Selection bias spread", "Load of the experts of layer 3",
        "Load of the experts of layer 4", "Load of the experts of mtp 1",
    ]  # fmt: skip
    assert page.says("8 × NVIDIA H100", "3.500 → 1.089", "40.0%", "39.0 s", "39K", "d0a3f9cabc + changes")
    assert page.says("steps: 100 → 40", "state_sha256 ab12cd", "after step 39", "layer 3", "jax 0.10.2", "data 8")
    assert "".join(page.found["pre"]) == "def f(x):\n    passold text", "the newest first"
    assert sum(tag == "line" and a.get("class") == "mark" for tag, a in page.tags) == 2, "resumed at 20, in two charts"


def test_the_page_is_closed_in_itself(tmp_path):
    evil = "</pre><script>alert(1)</script><img src=http://x.y/z onerror=alert(1)> \ud800 \x00 &amp;"
    manifest = {
        **MANIFEST,
        "config": {"model": {"name": evil}, evil: [evil]},
        "command_line": evil,
        "certificate": evil,
    }
    line = {"step": 1, "loss": 1.0, "held_out": {evil: {"loss": 1.0, "bits_per_byte": 1.0}}}
    page = Page(make_run(tmp_path, [line], manifest, [{"step": evil, "prompt": evil, "text": evil}]))
    assert not {"script", "img", "link", "iframe", "a"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "src"], (tag, attributes)
        assert attributes.get("href", "data:image/png").startswith("data:image/png")
    assert "url(" not in page.source and "@import" not in page.source
    assert ("meta", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in [
        (tag, attributes.get("content")) for tag, attributes in page.tags
    ]
    assert page.says("<script>alert(1)</script>", "&amp;")


@pytest.mark.parametrize(
    "line",
    [
        {"step": 0},
        {"step": 3, "loss": 2.0},
        {"step": 3, "loss": math.nan, "loss_main": math.inf, "grad_norm": -math.inf, "tokens": 5},
        {"step": 3, "loss": None, "router": {}, "held_out": {}},
        {"step": 3, "loss": "high", "router": None, "held_out": {"web": None}, "tokens": None},
        {"step": 3, "router": {"moe_layers": {"load": []}}},
        {"step": 3, "router": {"moe_layers": {"load": [[0.0, 0.0]], "max_violation": [math.nan]}}},
        {"step": 3, "router": {"moe_layers": {"load": [[math.nan, 1.0]], "entropy": [], "dropped": "x"}}},
        {"step": 3, "router": {"moe_layers": {"load": [[1.0], [1.0, 2.0]], "max_violation": [[1.0]]}}},
        {"step": 3, "tokens": 0, "tokens_per_second": 0.0, "skipped": 0, "held_out_ema": {"loss": 1.0}},
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_lines_that_say_little(tmp_path, line, count):
    Page(make_run(tmp_path, [{**line, "step": line["step"] + i} for i in range(count)]))


def test_a_dense_model_has_no_routers(tmp_path):
    manifest = {**MANIFEST, "config": {"model": {"name": "dense", "ffn": {"type": "Dense"}}}}
    page = Page(make_run(tmp_path, lines_of_a_run(router=False), manifest))
    assert "Routers" not in page.found["h2"] and "Curves" in page.found["h2"]


def test_values_that_are_not_finite_leave_gaps(tmp_path):
    lines = [{"step": i, "loss_main": math.nan if i in (3, 5) else 1.0 + i, "loss": math.nan} for i in range(8)]
    page = Page(make_run(tmp_path, lines))
    assert page.says("2 values are not finite", "next token 8") and not page.says("all parts")
    [path] = [a["d"] for tag, a in page.tags if tag == "path" and a.get("class") == "curve"]
    assert path.count("M") == 3
    assert sum(tag == "circle" for tag, _ in page.tags) == 1, "step 4 stands alone"


def test_a_run_cut_short(tmp_path):
    folder = make_run(tmp_path, lines_of_a_run())
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("broken\n\n")
        file.write(json.dumps({"step": 40, "loss": 1.5}) + "\n")
        file.write('{"step": 41, "router": {"moe_layers": {"load": [[1.')
    (folder / "samples.jsonl").write_text('{"step": 1}\n[]\n{"step": 40, "prompt": "a", "te')
    page = Page(folder)
    assert page.says("that cannot be read, and are left out: 1.", "step 40 of 100", "Expert load at step 39")
    assert "Samples" not in page.found["h2"]


@pytest.mark.parametrize("text", ["{", "[]", "\ufffd", '{"runs": 3, "devices": [], "git": 5, "mesh": 1, "config": 2}'])
def test_a_damaged_manifest(tmp_path, text):
    folder = make_run(tmp_path, lines_of_a_run(3), manifest=None)
    (folder / "manifest.json").write_text(text)
    assert "Curves" in Page(folder).found["h2"]


def test_a_run_that_has_just_begun(tmp_path):
    page = Page(make_run(tmp_path))
    (tmp_path / "metrics.jsonl").unlink()
    page = Page(tmp_path)
    assert page.found["h2"] == ["Starts", "Configuration", "Environment"]
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no run folder: it holds neither manifest.json nor metrics.jsonl"):
        report(tmp_path)


def test_loads_of_a_long_run_are_thinned_and_the_last_is_exact(tmp_path):
    rng = np.random.default_rng(1)
    loads = rng.random((901, 6, 4))
    with JsonlWriter(tmp_path / "metrics.jsonl") as writer:
        for step, load in enumerate(loads):
            moe = {"load": load, "max_violation": load.max(1)}
            writer.write(
                {"step": step, "tokens": step, "loss": 9.0 if step == 450 else 1.0, "router": {"moe_layers": moe}}
            )
        writer.write({"step": 901, "held_out_loss": 1.0})
    history = read_history(tmp_path / "metrics.jsonl")
    assert history.lines == 902 and history.last_load is not None
    step, groups = history.last_load
    np.testing.assert_array_equal(groups["moe_layers"], loads[-1].astype(np.float32))
    assert step == 900 and set(history.loads) == {("moe_layers", layer) for layer in (0, 3, 5)}
    for (_, layer), rows in history.loads.items():
        assert 100 < len(rows) <= 202 and rows[-1][0] == 900
        for at, load in rows:
            np.testing.assert_array_equal(load, loads[int(at), layer].astype(np.float32))
    assert len(history.layers["moe_layers", "max_violation"]) == 901
    report(tmp_path)
    page = Page(tmp_path)
    assert "MaxVio of each layer" in page.found["figcaption"]
    curve = next(a["d"] for tag, a in page.tags if tag == "path" and a.get("class") == "curve")
    heights = [float(point.split()[1]) for point in re.split("[ML]", curve)[1:]]
    assert len(heights) < 700 and min(heights) < 10, "the spike stays"


def test_a_large_mixture_makes_a_small_page_soon(tmp_path):
    make_run(tmp_path, lines_of_a_run(120, layers=58, experts=256))
    start = time.perf_counter()
    path = report(tmp_path)
    assert time.perf_counter() - start < 15
    assert len(path.read_bytes()) < 1_500_000


def test_the_verb(tmp_path, capsys):
    folder = make_run(tmp_path / "run", lines_of_a_run())
    assert main.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert main.main(["report", str(folder), "--output", str(tmp_path / "x/y.html")]) == 0
    assert (tmp_path / "x/y.html").read_text() == (folder / "report.html").read_text()
    assert main.main(["report", str(tmp_path)]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_a_report_needs_neither_jax_nor_matplotlib(tmp_path):
    make_run(tmp_path, lines_of_a_run(5))
    program = """
import sys
from deepseek_jax.cli.main import main
assert main(["report", sys.argv[1]]) == 0
assert not {"jax", "matplotlib"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program, str(tmp_path)], check=True, timeout=60)
