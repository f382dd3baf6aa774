"""What is read out of a compiled program, from texts written here; and the TPU compiler itself, on small models.

Each compilation runs in a child process, as `compile_plan` starts it.
"""

import json
import sys

import pytest
from marks import needs_libtpu

from deepseek_jax.cli import main
from deepseek_jax.planner.ask import make_request
from deepseek_jax.planner.compiled import _wanted, compile_plan
from deepseek_jax.planner.hlo import allocations, collectives_in, op_names, shape_bytes, summary

PROGRAM = """
%async.1 (p: bf16[1,16,32]) -> bf16[1,64,32] {
  %p = bf16[1,16,32]{2,1,0} parameter(0)
  ROOT %all-gather.7 = bf16[1,64,32]{2,1,0:T(8)} all-gather(%p), channel_id=7, replica_groups=[2,4], metadata={op_name="s/w"}
}

%async.2 (p: bf16[1,16,32]) -> bf16[1,64,32] {
  %p = bf16[1,16,32]{2,1,0} parameter(0)
  ROOT %all-gather.8 = bf16[1,64,32]{2,1,0} all-gather(%p), channel_id=7, replica_groups=mesh['x'=4] {'x'}
}

%body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %w = bf16[1,64,32]{2,1,0} fusion(%x), kind=kCustom, calls=%async.1
  %w2 = bf16[1,64,32]{2,1,0} fusion(%x), kind=kCustom, calls=%async.2
  %rs = f32[2,4]{1,0} reduce-scatter(%x), channel_id=9, replica_groups=[8,4]<=[32], dimensions={0}, to_apply=%add
  ROOT %r = (s32[], f32[8,4]{1,0}) tuple(%x, %rs)
}

%condition (t: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[] constant(58)
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0), metadata={op_name="state.params['w_gate']"}
  %t = (s32[], f32[8,4]{1,0}) tuple(%a, %a)
  %loop = (s32[], f32[8,4]{1,0}) while(%t), condition=%condition, body=%body
  %more = (s32[], f32[8,4]{1,0}) while(%loop), condition=%unknown, body=%body2, backend_config={"known_trip_count":{"n":"3"}}
  %start = (f32[8,4]{1,0}, f32[8,4]{1,0}) all-reduce-start(%a), channel_id=11, replica_groups={{0,1,2}}, to_apply=%add
  ROOT %done = f32[8,4]{1,0} all-reduce-done(%start)
}
"""

ASSIGNMENT = """BufferAssignment:
allocation 0: size 1024, parameter 0, shape |f32[8,4]| at ShapeIndex {}:
 value: <150 a @0> (size=1024,offset=0): f32[8,4]{1,0}
allocation 1: size 33554432, color 1, preallocated-temp:
 value: <67 vmem @1> (size=33554432,offset=0): bf16[1,2048,8192]{2,1,0}
allocation 2: size 9000, preallocated-temp:
 value: <1 all-gather.7 @0> (size=4096,offset=0): bf16[1,64,32]{2,1,0}
 value: <2 wide.param.1{2} (phi) @0> (size=4096,offset=0): bf16[1,64,32]{2,1,0}
 value: <3 smaller @0> (size=2048,offset=2048): f32[16,32]{1,0}
 value: <4 apart.1{0} @0> (size=1024,offset=4096): f32[8,4]{1,0}
"""


def test_collectives_of_a_text():
    """Loops are counted, the phases of an asynchronous collective are one, and the larger side of each is taken."""
    found = {one.kind: one for one in collectives_in(PROGRAM)}
    assert {kind: (one.shape, one.bytes, one.times, one.group) for kind, one in found.items()} == {
        "all-gather": ("bf16[1,64,32]", 4096, 58, 4),
        "reduce-scatter": ("f32[8,4]", 128, 58, 4),
        "all-reduce": ("f32[8,4]", 128, 1, 3),
    }
    assert found["all-gather"].where == "s/w"
    assert summary(collectives_in(PROGRAM))[0] == dict(
        kind="all-gather bf16", count=1, bytes=4096, dynamic_bytes=58 * 4096
    )


def test_bytes_of_types():
    assert shape_bytes("(f32[8,128]{1,0}, u32[], bf16[8,300])") == 4800
    assert shape_bytes("pred[16]") == 16 and shape_bytes("f8e4m3fn[4,4]") == 16 and shape_bytes("token[]") == 0


def test_regions_by_name():
    """Of what lies in one place at different times, one is named; other memory than the device's is left out."""
    found = list(allocations(ASSIGNMENT, {"f32[8,4]": "params/w_gate"}, op_names(PROGRAM)))
    assert [(one.bytes, one.name) for one in found] == [
        (4096, "bf16[1,64,32], w"),
        (1024, "state.params['w_gate'], f32[8,4]"),
        (1024, "like params/w_gate, f32[8,4], apart.1{0}"),
    ]


def test_what_a_refusal_asked_for():
    assert (
        _wanted("the total memory required for HLO temporaries (45.5G) exceeds available HBM (15.75G)") == 45.5 * 2**30
    )
    assert _wanted("Used 191.00G of 95.74G hbm. Exceeded") == 191 * 2**30
    assert _wanted("something else") is None


def test_no_compiler_for_gpus(capsys):
    assert main.main(["plan", *["deepseek-v2-lite", "--topology", "h100:8", "--compile"]]) == 2
    assert "no compiler does for h100" in capsys.readouterr().err


@pytest.mark.aot
@needs_libtpu
def test_a_training_step(capsys):
    words = (
        "deepseek-v3-micro --topology v5e:2x2 --mesh fsdp=2,expert=2 --seq 128 --batch 8 --remat full --compile --json"
    )
    assert main.main(["plan", *words.split()]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["fits"] is True and out["compile_seconds"] > 0 and out["compiler_peak_rss"] > 2**28
    assert 0 < out["compiled_bytes_per_device"] < 2**28 < out["hbm_bytes"]
    kinds = {row["kind"].split()[0] for row in out["collectives"]}
    assert "all-gather" in kinds and any(row["dynamic_bytes"] > row["bytes"] for row in out["collectives"])
    assert any("params" in name for name, _ in out["largest_allocations"])


@pytest.mark.aot
@needs_libtpu
def test_a_step_that_does_not_fit(capsys):
    """The compiler refuses it; what it asked for, the largest buffers by name, and what to change are still there."""
    words = "deepseek-llm-micro --topology v5e:2x2 --mesh fsdp=4 --seq 128 --batch 131072 --compile"
    assert main.main(["plan", *words.split()]) == 0
    out = capsys.readouterr().out
    assert "Compiled for the machine: DOES NOT FIT" in out
    compiled = out[out.index("Compiled") :]
    assert "dense_layers/attention" in compiled and "--remat full --moments bfloat16" in compiled


@pytest.mark.aot
@needs_libtpu
def test_a_decoding_step():
    request = make_request("deepseek-v2-lite-micro", "v6e:2x2", "fsdp=2,expert=2", step="decode", seq=128, batch=8)
    compiled = compile_plan(request)
    assert compiled.fits and compiled.memory is not None
    assert compiled.memory["alias_size"] > 0, "the caches are written where they are"


@pytest.mark.aot
@needs_libtpu
def test_a_failure_says_why(monkeypatch):
    request = make_request("deepseek-v3-micro", "v5e:2x2", "fsdp=4", seq=128)
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(ValueError, match="could not be compiled"):
        compile_plan(request)
