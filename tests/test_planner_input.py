"""What a plan is asked with: nothing that is given is dropped in silence, and what cannot be is refused with a remedy."""

import json
from dataclasses import replace
from typing import Any

import pytest
from helpers import micro, run_config

import deepseek_jax as dsj
from deepseek_jax.cli import main
from deepseek_jax.parallel import MeshConfig
from deepseek_jax.parallel.pipeline import Pipeline
from deepseek_jax.planner.advice import changes
from deepseek_jax.planner.ask import make_request
from deepseek_jax.planner.compiled import compile_plan
from deepseek_jax.planner.topology import parse_topology

LITE = "deepseek-v2-lite --topology v5p:4x4x4"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--seq 0", "--seq 0: must be a whole number, at least 1"),
        ("--batch 0", "--batch 0: must be"),
        ("--batch -64", "--batch -64: must be"),
        ("--accumulation 0", "--accumulation 0: must be"),
        ("--slices 0", "--slices 0: must be"),
        ("--search --batch 0", "--batch 0: must be"),
        ("--chunks 4", "--chunks 4: of a pipeline, and the mesh has stage = 1"),
        ("--schedule dualpipe", "--schedule dualpipe: of a pipeline, and the mesh has stage = 1"),
        ("--microbatches 4", "--microbatches 4: of a pipeline, and the mesh has stage = 1"),
        ("--mesh stage=4,fsdp=16 --schedule 1f1b", "give --microbatches too, a multiple of the mesh's stage = 4"),
        ("--mesh stage=4,fsdp=16 --microbatches 4 --batch 256 --schedule interleaved", "give --chunks, 2 or more"),
        ("--search --remat full", "--remat full: --search does not read it"),
        ("--search --accumulation 4", "--accumulation 4: --search does not read it"),
        ("--search --mesh fsdp=64", "--mesh fsdp=64: --search does not read it"),
        ("--search --picture x.png", "--picture x.png: --search does not read it"),
        ("--step decode --moments-on host", "--moments-on host: a decode step has no use for it"),
        ("--step decode --remat full", "--remat full: a decode step has no use for it"),
        ("--step grpo --moments-on host", "--moments-on host: a grpo step has no use for it"),
        ("--keep dumps", "--keep dumps: the dumps are the compiler's: give --compile too"),
        ("--picture /nonexistent/x.png", "there is no folder /nonexistent"),
        ("--picture /tmp", "must be a file's name that ends in .png or .svg"),
        ("--picture memory.jpeg2", "must be a file's name that ends in .png or .svg"),
    ],
)
def test_what_is_given_is_read_or_refused(words, says, capsys):
    assert main.main(["plan", *LITE.split(), *words.split()]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            "--topology v5e:16x32",
            "256 chips at most, 16 along a dim; ask for several, such as --topology v5e:16x16 --slices 2",
        ),
        ("--topology v6e:17x17", "a slice of v6e has 256 chips at most"),
        ("--topology v5e:8x8x8", "a slice of v5e has 256 chips at most"),
        ("--topology v5e-17", "16 along a dim"),
        ("--topology v5e:4x4x1", "16 chips are v5e:4x4"),
        ("--topology v5p-0", "must have a chip at least, such as v5p-8"),
        ("--topology v5p:4x4x4 --slices 1 --mesh slice=2,fsdp=32", "--slices 1: the mesh has slice = 2"),
        ("--topology v5p:4x4x4 --mesh fsdp=--64", "'fsdp=--64' must be AXIS=NUMBER"),
        ("--topology v5p:4x4x4 --mesh pipeline=64", "axes are slice, stage, data, fsdp, expert, context, tensor"),
        ("--topology v5p:4x4x4 --set num_hidden_layers=four", "num_hidden_layers = 'four' (str): must be int"),
        ("--topology v5p:4x4x4 --tokens inf", "tokens = inf: must be a number greater than 0"),
        ("--topology v5p:3x3x3", "the nearest that does is 16, on a multiple of 16 devices: there are 27"),
        ("--topology v5p-3000", "the nearest that does is 512, on a multiple of 512 devices: there are 1500"),
    ],
)
def test_machines_meshes_and_numbers_that_cannot_be(words, says, capsys):
    assert main.main(["plan", "deepseek-v3", *words.split()]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"mesh": {"pipe": 64}}, "no axis is named 'pipe'; axes are slice"),
        ({"mesh": {"fsdp": "64"}}, "fsdp = '64': must be a whole number"),
        ({"moments": "float8"}, "--moments float8: must be one of float32, bfloat16"),
        ({"tokens": float("nan")}, "tokens = nan: must be a number"),
        ({"tokens": "many"}, "tokens = 'many': must be a number"),
    ],
)
def test_words_from_python(given, says):
    with pytest.raises(ValueError, match=says):
        dsj.plan("deepseek-v2-lite", "v5p:4x4x4", **given)


def test_twice_the_chips_is_a_machine_that_exists():
    def advised(topology: str) -> list[str]:
        mesh = f"fsdp={parse_topology(topology).devices}"
        found = changes(make_request("deepseek-llm-67b", topology, mesh))
        return [one.request.topology.name for one in found if "twice" in one.what]

    assert advised("v5e:8x16") == ["v5e:16x16"] and advised("v5e:16x16") == []
    assert advised("v5p:4x4x4") == ["v5p:4x4x8"] and advised("h100:2x8") == ["h100:4x8"]


@pytest.mark.parametrize(
    ("price", "assumed", "says"),
    [
        ("NaN", "true", "prices.h100.price = nan: must be a number greater than 0"),
        ("Infinity", "true", "prices.h100.price = inf: must be"),
        ("2", '"false"', "prices.h100.assumed = 'false': must be true or false"),
    ],
)
def test_prices_that_are_none(price, assumed, says, tmp_path):
    file = tmp_path / "prices.json"
    row = f'{{"price": {price}, "assumed": {assumed}, "source": "me"}}'
    file.write_text(f'{{"as_of": "today", "currency": "EUR", "prices": {{"h100": {row}}}}}')
    with pytest.raises(ValueError, match=says):
        dsj.plan("deepseek-v2-lite", "h100:8", prices=file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="prices.json: is no text: must be JSON"):
        dsj.plan("deepseek-v2-lite", "h100:8", prices=file)


def test_zero_is_given_from_python_too():
    with pytest.raises(ValueError, match="--seq 0: must be a whole number, at least 1"):
        dsj.plan("deepseek-v2-lite", "v5p:4x4x4", seq=0)


def test_what_is_served_is_served_at_once():
    """Whatever pieces the config trains in."""
    run = run_config(micro("llm"), mesh=MeshConfig(data=1, fsdp=8), batch_size=48, accumulation=3)
    served = make_request(run, "h100:8", step="decode", batch=16)
    assert (served.run.batch_size, served.rows) == (16, 2)


def test_a_configs_own_pipeline_takes_chunks_and_schedule():
    run = replace(run_config(micro("llm")), mesh=MeshConfig(data=1, stage=2, fsdp=-1), batch_size=8)
    run = replace(run, pipeline=Pipeline(microbatches=4, schedule="1f1b"))
    run = replace(run, model=replace(run.model, num_hidden_layers=4))
    asked = make_request(run, "v5p:2x1x1", chunks=2, schedule="gpipe")
    assert asked.run.pipeline == Pipeline(microbatches=4, chunks=2)
    assert asked.pipeline_words == {"schedule": "interleaved", "microbatches": 4, "chunks": 2}


def test_of_a_schedule_that_is_not_built_the_idle_time_alone_counts(capsys):
    given: dict[str, Any] = dict(remat="full", moments="bfloat16", batch=512, microbatches=8)
    built, dual = (
        dsj.plan("deepseek-v3", "v5p:8x8x8", "stage=8,fsdp=8,expert=8", schedule=schedule, **given)
        for schedule in ("gpipe", "dualpipe")
    )
    assert dual.memory == built.memory and dual.times.idle < built.times.idle
    assert "dualpipe is not built here: only its idle time is counted, memory is that of gpipe" in str(dual)
    with pytest.raises(ValueError, match="--compile: schedule dualpipe is not built here: take gpipe, 1f1b"):
        compile_plan(dual.request)
    words = "--mesh stage=4,fsdp=16 --microbatches 4 --batch 256 --schedule zb1p --json"
    assert main.main(["plan", *LITE.split(), *words.split()]) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["schedule"], out["microbatches"], out["chunks"]) == ("zb1p", 4, 1)
