"""Weights' gradients: rounded to the compute dtype before devices add theirs, or in float32 all the way."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import micro, random_tokens, random_variables
from marks import needs_libtpu

from deepseek_jax.layers.linear import linear
from deepseek_jax.layers.weights import for_product
from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.planner.ask import make_request
from deepseek_jax.planner.compiled import compile_plan

CASES = {
    "btd,df->btf": ((2, 64, 32), (32, 24)),
    "btd,dnh->btnh": ((2, 64, 32), (32, 4, 8)),
    "btnh,nhd->btd": ((2, 64, 4, 8), (4, 8, 24)),
    "btnp,cnp->btnc": ((2, 64, 4, 8), (16, 4, 8)),
}


@pytest.mark.parametrize("subscripts", CASES)
def test_a_weights_gradient_is_as_wide_as_the_weight(subscripts):
    shape, weights = CASES[subscripts]
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal(shape), jnp.bfloat16)
    w = jnp.asarray(draw.standard_normal(weights), jnp.float32)
    out = linear(subscripts, x, w)
    d = jnp.asarray(draw.standard_normal(out.shape), jnp.bfloat16)

    def gradients(cast):
        _, back = jax.vjp(lambda x, w: linear(subscripts, x, w.astype(jnp.bfloat16) if cast else w), x, w)
        return back(d)

    (dx, dw), (dx_cast, dw_cast) = gradients(False), gradients(True)
    assert out.dtype == dx.dtype == jnp.bfloat16 and dw.dtype == dw_cast.dtype == jnp.float32
    np.testing.assert_array_equal(out, jnp.einsum(subscripts, x, w.astype(jnp.bfloat16)))
    np.testing.assert_array_equal(dx, dx_cast)
    left, right = subscripts.split("->")
    ours, theirs = left.split(",")
    exact = np.einsum(f"{ours},{right}->{theirs}", *(np.asarray(a, np.float64) for a in (x, d)))
    assert np.abs(dw - exact).max() < 1e-5 < 1e-3 < np.abs(dw_cast - exact).max()


@pytest.mark.parametrize("gradient_sum, rounded", [("compute", True), ("float32", False)])
def test_gradients_of_a_model_are_in_float32_where_asked(gradient_sum, rounded):
    config = micro("llm-gqa", num_hidden_layers=1, dtype="bfloat16", gradient_sum=gradient_sum)
    config = replace(config, attention=replace(config.attention, qkv_bias=True))
    model, tokens = DeepSeek(config), random_tokens(config, (2, 8))
    variables = random_variables(config)

    def total(params):
        return model.apply({"params": params}, tokens, method="hidden").hidden.astype(jnp.float32).sum()

    layers = jax.jit(jax.grad(total))(variables["params"])["dense_layers"]
    weights = {**layers["attention"], **layers["ffn"]}
    assert {"b_q", "b_v", "w_q", "w_o", "w_gate", "w_down"} <= set(weights)
    for name, dw in weights.items():
        assert bool((dw == dw.astype(jnp.bfloat16)).all()) == rounded, name


def test_stored_weights_are_widened_whatever_they_are_stored_in():
    for stored, compute in (("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")):
        w = jnp.ones(3, stored)
        assert for_product(w, compute, False).dtype == compute and for_product(w, compute, True).dtype == jnp.float32


@pytest.mark.study
@needs_libtpu
@pytest.mark.aot
@pytest.mark.parametrize("gradient_sum, dtype", [("compute", "bf16"), ("float32", "f32")])
def test_what_travels_when_devices_add_their_gradients(gradient_sum, dtype):
    """Layers of experts on an absent v5e:2x4: weights of shapes that nothing else has."""
    request = make_request("deepseek-v3-micro", "v5e:2x4", "fsdp=4,expert=2", seq=128, batch=8, mtp=False)
    model = request.run.model
    ffn = replace(model.ffn, n_routed_experts=16, moe_intermediate_size=384, first_k_dense_replace=0)
    model = replace(model, hidden_size=640, num_hidden_layers=2, ffn=ffn, dtype="bfloat16", gradient_sum=gradient_sum)
    compiled = compile_plan(replace(request, run=replace(request.run, model=model)))
    sums = [
        one.shape for one in compiled.collectives if one.kind in ("reduce-scatter", "all-reduce") and "640" in one.shape
    ]
    weights = [shape for shape in sums if "384" in shape or "[4,8,640]" in shape]  # experts', shared experts', w_o's
    assert len(weights) >= 3 and {shape.split("[")[0] for shape in weights} == {dtype}, sums
