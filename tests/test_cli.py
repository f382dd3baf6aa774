"""The command line: what it prints, what it refuses and how, and what it passes on."""

import os
import subprocess
import sys
import textwrap
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import deepseek_jax as dsj
from deepseek_jax.cli import device, main
from deepseek_jax.cli import train as train_verb
from deepseek_jax.config import GQA, MLA, Dense, ModelConfig, MoE, Rope, YarnScaling

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Schedule:
    peak: float = 1e-3
    """Peak learning rate."""


@dataclass(frozen=True, kw_only=True)
class ToyRun:
    """Stands for RunConfig: the verb must not depend on which fields a run has."""

    model: ModelConfig
    schedule: Schedule = field(default_factory=Schedule)
    steps: int = 10
    checkpoint_every: int | None = None

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"ToyRun.steps = {self.steps}: must not be negative")


def toy_run() -> ToyRun:
    attention = MLA(
        num_attention_heads=2,
        q_lora_rank=None,
        kv_lora_rank=4,
        qk_nope_head_dim=2,
        qk_rope_head_dim=2,
        v_head_dim=2,
    )
    experts = MoE(
        intermediate_size=8,
        moe_intermediate_size=4,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        n_group=2,
        topk_group=1,
    )
    scaling = YarnScaling(factor=4.0, original_max_position_embeddings=8)
    model = ModelConfig(
        name="toy",
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=2,
        attention=attention,
        ffn=experts,
        rope=Rope(interleaved=True, scaling=scaling),
        max_position_embeddings=32,
    )
    return ToyRun(model=model)


@pytest.fixture
def trained(monkeypatch):
    """Calls of `dsj.train`, with the training room replaced by a toy."""
    calls = []
    room = types.ModuleType("deepseek_jax.training")
    room.RunConfig, room.toy_run = ToyRun, toy_run
    monkeypatch.setitem(sys.modules, "deepseek_jax.training", room)

    def train(config, run_dir):
        calls.append((config, run_dir))
        return types.SimpleNamespace(summary=lambda: "done")

    monkeypatch.setitem(dsj.__dict__, "train", train)
    return calls


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text("from deepseek_jax.training import toy_run as get_config\n")
    return str(path)


def refused(capsys, *words) -> str:
    """What stderr says when the command line refuses `words` with exit code 2."""
    try:
        code = main.main(list(words))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert "Traceback" not in captured.err
    return " ".join(captured.err.replace("│", " ").split())


def test_help_imports_no_jax():
    program = """
        import sys
        from deepseek_jax.cli.main import main
        try:
            main(["--help"])
        except SystemExit as stop:
            assert stop.code == 0
        heavy = {"jax", "flax", "numpy", "optax", "orbax", "grain", "tyro", "tensorflow_datasets", "matplotlib"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for verb in main.VERBS:
        assert verb in done.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["--version"])
    assert stop.value.code == 0
    assert dsj.__version__ in capsys.readouterr().out


def test_unknown_verb(capsys):
    assert "invalid choice: 'trian'" in refused(capsys, "trian")


def test_no_verb(capsys):
    assert "required: VERB" in refused(capsys)


def test_train_passes_config_and_default_run_dir(trained, config_file, capsys):
    assert main.main(["train", config_file]) == 0
    assert capsys.readouterr().out == "done\n"
    assert trained == [(toy_run(), "runs/toy")]


def test_train_overrides_are_typed_and_keep_the_kind_of_a_union(trained, config_file):
    flags = """
        --run-dir x/y --steps 3 --checkpoint-every 2 --schedule.peak 1 --model.attention.q-lora-rank 4
        --model.ffn.n-group 4 --model.rope.scaling.factor 8 --model.rope.no-interleaved
    """
    assert main.main(["train", config_file, *flags.split()]) == 0
    [(config, run_dir)] = trained
    assert run_dir == "x/y"
    assert (config.steps, config.checkpoint_every, config.schedule.peak) == (3, 2, 1.0)
    assert isinstance(config.schedule.peak, float)
    assert isinstance(config.model.attention, MLA) and config.model.attention.q_lora_rank == 4
    assert isinstance(config.model.ffn, MoE) and config.model.ffn.n_group == 4
    assert isinstance(config.model.rope.scaling, YarnScaling) and config.model.rope.scaling.factor == 8.0
    assert not config.model.rope.interleaved


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--stepz", "3"], ["Unrecognized options: --stepz", "--steps INT"]),
        (["--model.attention.num-key-value-heads", "2"], ["Unrecognized options", "num-key-value-heads"]),
        (["--steps", "many"], ["--steps", "'many'", "INT"]),
        (["--schedule.peak", "high"], ["--schedule.peak", "'high'", "FLOAT"]),
        (["--model.dtype", "int8"], ["--model.dtype", "int8", "bfloat16"]),
        (["--steps", "-1"], ["ToyRun.steps = -1: must not be negative"]),
        (["--model.ffn.n-group", "3"], ["MoE.n_group = 3: must divide n_routed_experts = 8"]),
    ],
)
def test_train_refuses_overrides(trained, config_file, capsys, flags, messages):
    said = refused(capsys, "train", config_file, *flags)
    for message in messages:
        assert message in said
    assert not trained


def test_train_help_shows_the_overrides(trained, config_file, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["train", config_file, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--run-dir", "--steps INT", "--model.attention.kv-lora-rank INT", "--schedule.peak FLOAT"):
        assert flag in shown


CHANGED = """
from dataclasses import replace
from deepseek_jax.training import toy_run

def get_config():
    return replace(toy_run(), {change})
"""


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.py", None, "no such config file"),
        ("toy.json", "{}", "a config file is Python"),
        ("toy.py", "x = 1", "defines no get_config()"),
        ("toy.py", "def get_config(): return {}", "get_config() returned a dict: must be a ToyRun"),
        ("toy.py", CHANGED.format(change="steps=True"), "ToyRun.steps = True (bool): must be int"),
        ("toy.py", CHANGED.format(change="steps=-3"), "ToyRun.steps = -3: must not be negative"),
    ],
)
def test_train_refuses_config_files(trained, tmp_path, capsys, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    assert message in refused(capsys, "train", str(path))
    assert not trained


def test_train_without_config(capsys):
    assert "CONFIG.py" in refused(capsys, "train")


def test_traceback_on_request(trained, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_JAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such config file"):
        main.main(["train", "absent.py"])


def test_every_config_file_loads_and_takes_overrides():
    paths = sorted((ROOT / "configs").glob("*.py"))
    stages = {path for path in paths if path.stem in ("deepseek_r1", "r1_small")}
    assert len(stages) == 2 and len(paths) > 2
    for path in paths:
        config = train_verb.load_config(path, dsj.R1 if path in stages else None)
        assert train_verb.override(config, [], run_dir="x") == (config, "x")
        if path in stages:
            changed = train_verb.override(config, ["--stages.0.run.steps", "7"], run_dir="x")[0]
            assert changed.stages[0].run.steps == 7 and changed.stages[1:] == config.stages[1:]
            continue
        assert train_verb.override(config, ["--steps", "7"], run_dir="x")[0].steps == 7


def test_generate_passes_its_options(monkeypatch, capsys):
    calls = []
    monkeypatch.setitem(dsj.__dict__, "open_model", lambda path, dtype: f"loaded {path}")
    monkeypatch.setitem(
        dsj.__dict__, "continue_text", lambda *args, **options: calls.append((args, options)) or [" f(): ..."]
    )
    assert main.main(["generate", "runs/x", "--prompt", "def", "--seed", "3", "--temperature", "0"]) == 0
    options = {
        "max_new_tokens": 128, "temperature": 0.0, "top_p": 0.95, "top_k": 0, "seed": 3, "stop": (), "samples": 1,
        "speculate": False,
    }  # fmt: skip
    assert calls == [(("loaded runs/x", ["def"]), options)]
    assert capsys.readouterr().out == "def f(): ...\n"


def test_generate_refuses_what_is_no_model(tmp_path, capsys):
    assert "has neither manifest.json (a run) nor config.json" in refused(
        capsys, "generate", str(tmp_path), "--prompt", "def"
    )


def test_models_prints_a_row_a_member(monkeypatch, capsys):
    dense = ModelConfig(
        name="dense",
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=2,
        attention=GQA(num_attention_heads=2, num_key_value_heads=1, head_dim=4),
        ffn=Dense(intermediate_size=16),
        rope=Rope(),
        max_position_embeddings=32,
        assumed=("intermediate_size",),
    )
    members = {"dense": dense, "toy": toy_run().model}
    counts = types.SimpleNamespace(
        total=1234567, main=1200000, mtp=0, active=99, active_without_embedding=98, router_bias=8, mtp_router_bias=4
    )
    monkeypatch.setitem(dsj.__dict__, "get_config", members.__getitem__)
    monkeypatch.setitem(dsj.__dict__, "list_configs", lambda: list(members))
    monkeypatch.setitem(dsj.__dict__, "count_params", lambda config: counts)
    assert main.main(["models"]) == 0
    header, first, second, *_ = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["model", "total", "main"]
    assert first.split() == ["dense", "1,234,567", "1,200,000", "99", "98", "-", "8", "+", "4", "intermediate_size"]
    assert second.split()[0] == "toy"
    assert main.main(["models", "toy"]) == 0
    assert "dense" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "libtpu", "nodes", "chosen"),
    [
        ({}, True, (), "cpu"),
        ({}, False, (), None),
        ({}, True, ("/dev/accel*",), None),
        ({}, True, ("/dev/nvidia[0-9]*",), None),
        ({"TPU_NAME": "x"}, True, (), None),
        ({"JAX_PLATFORMS": "tpu,cpu"}, True, (), "tpu,cpu"),
    ],
)
def test_platform_is_the_cpu_only_where_a_tpu_is_looked_for_in_vain(monkeypatch, environment, libtpu, nodes, chosen):
    monkeypatch.setattr(os, "environ", dict(environment))
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: object() if libtpu else None)
    monkeypatch.setattr(device.glob, "glob", lambda pattern: [pattern] if pattern in nodes else [])
    device.choose_platform()
    assert os.environ.get("JAX_PLATFORMS") == chosen
