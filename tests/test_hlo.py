"""What the TPU compiler made of a sharded step: what must never be whole on a device is not, and what travels is small.

A V3 with sizes that no other dim has, fsdp 4 × expert 2, its step compiled for an absent v5e:2x4 in a child process.
"""

import re
from dataclasses import replace
from math import prod

import jax
import pytest
from marks import needs_libtpu

from deepseek_jax.models.counts import abstract_variables
from deepseek_jax.parallel.rules import unbox
from deepseek_jax.planner.ask import make_request
from deepseek_jax.planner.compiled import Compiled, compile_plan

pytestmark = [pytest.mark.aot, needs_libtpu]

B, T, D, F, E, W = 40, 128, 640, 384, 16, 4096


@pytest.fixture(scope="module")
def step() -> tuple[Compiled, dict[str, tuple[int, ...]]]:
    """The compiled step, and the shapes of the whole weights by name."""
    request = make_request("deepseek-v3-micro", "v5e:2x4", "fsdp=4,expert=2", seq=128, batch=B, remat="full")
    model = request.run.model
    # No dense layer: the shared experts are one, and each kind of layer takes the compiler half a minute.
    ffn = replace(model.ffn, n_routed_experts=E, moe_intermediate_size=F, first_k_dense_replace=0)
    model = replace(model, hidden_size=D, vocab_size=W, num_hidden_layers=2, ffn=ffn, dtype="bfloat16")
    request = replace(request, run=replace(request.run, model=model))
    leaves = jax.tree_util.tree_leaves_with_path(unbox(abstract_variables(model))["params"])
    return compile_plan(request), {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


def shapes(text: str) -> set[tuple[str, tuple[int, ...]]]:
    found = re.findall(r"\b(f32|bf16)\[([\d,]+)\]", text)
    return {(dtype, tuple(int(dim) for dim in dims.split(",") if dim != "1")) for dtype, dims in set(found)}


def test_no_activation_of_the_whole_batch(step):
    compiled, _ = step
    whole = {tuple(sorted((B, T, D))), tuple(sorted((B * T, D)))}
    assert not {shape for _, shape in shapes(compiled.text) if tuple(sorted(shape)) in whole}


def test_experts_stay_split(step):
    """No array holds all experts' matrices: what the rules split over `expert` is never gathered over it."""
    compiled, _ = step
    assert not {shape for _, shape in shapes(compiled.text) if {E, D, F} <= set(shape)}
    assert {shape for _, shape in shapes(compiled.text) if {E // 2, D, F} <= set(shape)}, "the check sees gathered ones"


def test_weights_travel_one_layer_at_a_time_in_the_compute_dtype(step):
    compiled, weights = step
    gathered = [one for one in compiled.collectives if one.kind == "all-gather"]
    assert gathered
    stacks = {shape for name, shape in weights.items() if "moe_layers" in name}
    for one in gathered:
        dtype, dims = one.shape.rstrip("]").split("[")
        shape = tuple(int(dim) for dim in dims.split(",") if dim not in ("", "1"))
        assert not (dtype == "f32" and prod(shape) >= D * 64), f"{one} is a weight in float32"
        assert not (len(shape) > 2 and shape in stacks), f"{one} is a whole stack of layers"


def test_nothing_in_float32_is_whole(step):
    """Masters, moments and gradients exist in shards alone; the head's gradient is added up whole, once."""
    compiled, weights = step
    whole = {
        tuple(dim for dim in shape if dim != 1)
        for name, shape in weights.items()
        if prod(shape) >= D * 64 and "head" not in name and "router" not in name
    }
    assert not {shape for dtype, shape in shapes(compiled.text) if dtype == "f32" and shape in whole}


def test_the_old_state_is_given_away(step):
    compiled, _ = step
    assert compiled.memory is not None
    assert compiled.memory["alias_size"] > 0.95 * compiled.memory["argument_size"]
