"""Traffic and what it costs on each kind of link, against hand-made sums."""

from dataclasses import replace

import pytest

import deepseek_jax as dsj
from deepseek_jax.planner.topology import parse_topology


def moved(plan, name: str) -> dict[str, float]:
    """Bytes by link of what has this in its name."""
    found: dict[str, float] = {}
    for one in plan.traffic:
        if name in one.name:
            found[one.link] = found.get(one.link, 0) + one.bytes
    return found


def speed(plan, name: str) -> float:
    return next(one.bytes / one.seconds for one in plan.traffic if name in one.name)


def test_weights():
    """Dense, fsdp 64: each device receives 63/64 of all layers' weights in bfloat16, twice, and their gradients once; of the
    head once, and its gradient in float32. Of them its host needs 56/64, by eight network cards."""
    model = replace(dsj.get_config("deepseek-llm-7b"), name="x")
    plan = dsj.plan(model, "h100:8x8", "fsdp=64")
    head = 102_400 * 4096
    layers = dsj.count_params(model).total - 2 * head - 4096 * (2 * 30 + 1)
    found = {"forward": 2 * (layers + head), "backward": 2 * layers, "reduced": 2 * layers + 4 * head}
    for name, size in found.items():
        network = size * 56 / 64 / 8
        inside = size * 63 / 64 - network
        assert moved(plan, name) == {"network": pytest.approx(network), "nvlink": pytest.approx(inside)}
    inside = dsj.plan(model, "h100:8", "fsdp=8")
    assert {c.link for c in inside.traffic} == {"nvlink"}
    assert dsj.plan(model, "h100:1").traffic == ()


def test_the_embedding_exchanges_tokens():
    """A device's own tokens, there and back as gradients; where sequences are split, its part of the table is gathered."""
    plan = dsj.plan("deepseek-llm-7b", "h100:8", "fsdp=8", batch=16, seq=4096)
    assert moved(plan, "embedded tokens") == {"nvlink": 2 * 2 * 4096 * 4096 * 2 * 7 / 8}
    split = dsj.plan("deepseek-llm-7b", "h100:8", "fsdp=2,context=4", batch=16, seq=4096)
    assert moved(split, "embedded tokens") == {"nvlink": 2 * 8 * 1024 * 4096 * 2 / 2}
    assert moved(split, "embedding gathered") == {"nvlink": 102_400 * 4096 / 2 * (2 + 4) * 3 / 4}


def test_the_reference_of_grpo():
    """One more forward pass: weights are gathered, and tokens travel out and back."""
    train, grpo = (
        dsj.plan("deepseek-v3", "h100:8x8", "fsdp=8,expert=8", remat="full", mtp=False, step=step)
        for step in ("train", "grpo")
    )
    assert moved(grpo, "reference gathered") == moved(train, "gathered, forward") and not moved(train, "reference")
    assert moved(grpo, "experts and back")["nvlink"] / moved(train, "experts and back")["nvlink"] == pytest.approx(
        8 / 6
    )


@pytest.mark.parametrize(("remat", "dense", "moe"), [("none", 4, 6), ("full", 5, 7)])
def test_sums_over_tensor(remat, dense, moe):
    plan = dsj.plan("deepseek-v2-lite", "h100:2", "tensor=2", remat=remat, batch=1, seq=4096)
    assert moved(plan, "over tensor") == {"nvlink": (dense + 26 * moe) * 2 * 4096 * 2048 * 2 / 2}


@pytest.mark.parametrize(
    ("exchange", "remat", "trips"),
    [
        ("ragged", "none", 4), ("ragged", "v3", 5), ("ragged", "full", 6),
        ("ring", "none", 4), ("ring", "v3", 4), ("ring", "full", 5),
    ],
)  # fmt: skip
def test_experts(exchange, remat, trips):
    """Rows out and back in both passes, and what is sent again: tokens · top-8 · 7168 · 2 bytes · 7/8 each time, over 58
    layers and the module. On the ring all tokens of the seven others come: as many."""
    plan = dsj.plan("deepseek-v3", "h100:8x8", "fsdp=8,expert=8", remat=remat, fields=(f"expert_exchange={exchange}",))
    assert moved(plan, "experts and back") == {"nvlink": pytest.approx(59 * trips * 4096 * 8 * 7168 * 2 * 7 / 8)}
    assert speed(plan, "experts and back") == pytest.approx(450e9)


def test_experts_on_several_hosts():
    """Of 15 other parts eight lie on the other host, and come over a GPU's own network card."""
    plan = dsj.plan("deepseek-v3", "h100:2x8", "expert=16", remat="none")
    found = moved(plan, "experts and back")
    assert found["network"] / found["nvlink"] == pytest.approx(8 / 7)
    assert sum(found.values()) == pytest.approx(59 * 4 * 4096 * 8 * 7168 * 2 * 15 / 16)


def test_rings_of_a_torus():
    """Closed rings are twice as fast. An all-to-all over one of 16 takes 16 / 8 of a device's bytes, its own 1/16 among
    them, over a link of 50 GB/s; an open one of 8 takes 8 / 4 of them."""
    open_ring, closed = (dsj.plan("deepseek-v2-lite", f"v5e:{n}x{n}", f"fsdp={n},expert={n}") for n in (8, 16))
    assert speed(open_ring, "weights gathered") == pytest.approx(50e9)
    assert speed(closed, "weights gathered") == pytest.approx(2 * 50e9)
    assert speed(open_ring, "experts and back") == pytest.approx(50e9 / 2 * 7 / 8)
    assert speed(closed, "experts and back") == pytest.approx(50e9 / 2 * 15 / 16)


def test_a_torus_of_three_dims_closes_where_all_are_multiples_of_four():
    assert [parse_topology("v5p:2x2x4").wraps(dim) for dim in range(3)] == [False] * 3
    assert [parse_topology("v4:4x4x8").wraps(dim) for dim in range(3)] == [True] * 3
    assert [parse_topology("v5e:8x16").wraps(dim) for dim in range(2)] == [False, True]


@pytest.mark.parametrize(("remat", "sends"), [("none", 4), ("v3", 4), ("full", 5)])
def test_keys_and_values_go_round(remat, sends):
    """Eight sends in each pass, and eight of gradients, which are twice as wide; by one link in one direction."""
    plan = dsj.plan("deepseek-v3", "v5p:4x4x8", "context=8,fsdp=16", remat=remat, seq=4096)
    assert moved(plan, "around the ring") == {"ici": 62 * 512 * (512 + 64) * 2 * 8 * sends}
    assert speed(plan, "around the ring") == 100e9


def test_keys_and_values_of_groups_are_split_over_tensor():
    """67B: eight heads of 128 for keys and values each, on two devices."""
    plan = dsj.plan("deepseek-llm-67b", "h100:2x8", "context=8,tensor=2", remat="none", seq=4096)
    assert sum(moved(plan, "around the ring").values()) == 95 * 512 * 8 * 2 * (8 / 2) * 128 * 2 * 4


def test_gradients_are_summed_over_copies_in_each_piece():
    """Twice 1/2 of each weight: of layers in bfloat16, of embedding, head and norms in float32."""
    model = replace(dsj.get_config("deepseek-llm-7b"), name="x")
    once, wide, twice = (
        dsj.plan(model, "h100:2", "data=2", batch=2 * pieces, accumulation=pieces, fields=(f"gradient_sum={how}",))
        for how, pieces in (("compute", 1), ("float32", 1), ("compute", 2))
    )
    total, ends = dsj.count_params(model).total, 2 * 102_400 * 4096 + 4096 * (2 * 30 + 1)
    assert moved(once, "summed over data") == {"nvlink": 2 * (total - ends) + 4 * ends}
    assert moved(wide, "summed over data") == {"nvlink": 4 * total}
    assert moved(twice, "summed over data") == {"nvlink": 2 * (2 * (total - ends) + 4 * ends)}


def test_a_pipeline_gathers_and_sends_in_each_tick():
    """67B's 95 layers on eight stages are twelve on each, in 8 + 7 ticks; a device has a sequence of each microbatch."""
    mesh, given = "stage=8,fsdp=8", dict(remat="full", batch=64, seq=4096)
    flat = dsj.plan("deepseek-llm-67b", "v5p:4x4x4", mesh, **given)
    piped = dsj.plan("deepseek-llm-67b", "v5p:4x4x4", mesh, microbatches=8, **given)
    layer = 2 * 8192 * (8192 + 1024) + 3 * 8192 * 22016
    within = {c.name: c.bytes for c in piped.traffic if c.axes == ("fsdp",)}
    for name in ("weights gathered, forward", "weights gathered, backward", "gradients reduced and scattered"):
        assert within[name] == 15 * 12 * layer * 2 * 7 / 8
    assert moved(piped, "to their stages") == {"ici": 95 * layer / 64 * (2 + 4) * 7 / 8}
    # The streams of microbatches and of results, and what goes on to the next stage; for gradients too.
    assert moved(piped, "from stage to stage") == {"ici": 2 * 3 * 15 * 4096 * 8192 * 2}
    assert not moved(flat, "stage to stage") and not moved(flat, "to their stages")


def test_empty_layers_of_a_pipeline():
    """V3's 58 layers on eight stages are 64: worked off, sent about and kept."""
    given = dict(remat="full", batch=512, seq=4096)
    plan = dsj.plan("deepseek-v3", "v5p:8x8x8", "stage=8,fsdp=8,expert=8", microbatches=8, **given)
    kept = {b.name: b.bytes for b in plan.memory.buffers}
    assert kept["block_in of 58 moe_layers"] == 64 * 4096 * 7168 * 2 * 15 / 8  # in the ticks without a microbatch too
    layers = sum(size for name, size in kept.items() if name in ("parameters: experts", "parameters: shared"))
    assert kept["layers of a stage"] > layers / 4 * 2 * 64 / 58
    assert moved(plan, "experts and back") == {"ici": 65 * 6 * 4096 * 8 * 7168 * 2 * 7 / 8}
    longer = dsj.plan("deepseek-v3", "v5p:8x8x8", "fsdp=64,expert=8", fields=("num_hidden_layers=67",), **given)
    assert plan.flops.executed == pytest.approx(longer.flops.executed) and plan.flops.model < longer.flops.model
    assert plan.times.compute == pytest.approx(longer.times.compute)
