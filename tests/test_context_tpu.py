"""A training step with split sequences compiles for TPUs that are not there, and no device holds what it should not.

The compiler runs in a child process, because its settings are read once. Run this file as a script to see what it prints.
"""

import json
import re
from typing import Any

from marks import needs_libtpu
from spread import printed_by_child

HEADS, LATENT, ROPE, PLACES = 4, 512, 64, 1024  # of MLA, and of a device's part of a sequence


@needs_libtpu
def test_latents_alone_go_round_and_no_sequence_is_whole():
    split = json.loads(printed_by_child(__file__, "v5p"))
    assert split["kernels"] >= 4  # a shard's own part and the others', forward and backward
    # Latents in bfloat16, their gradients in float32, ids; nothing by heads.
    moved = {tuple(shape) for shape in split["moved"] if len(shape) == 3}
    assert moved == {(1, PLACES, LATENT), (1, PLACES, ROPE)}
    assert not [shape for shape in split["shapes"] if 4 * PLACES in shape and len(shape) > 1]


def main() -> None:
    from dataclasses import replace

    import jax
    import jax.numpy as jnp
    from helpers import run_config
    from jax.experimental import topologies

    import deepseek_jax as dsj
    from deepseek_jax.config import Dense
    from deepseek_jax.parallel import MeshConfig, make_mesh, use_mesh
    from deepseek_jax.parallel.rules import named_sharding
    from deepseek_jax.training.state import abstract_state
    from deepseek_jax.training.step import BATCH_AXES, compile_train_step

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    v3 = dsj.get_config("deepseek-v3")
    attention = replace(v3.attention, num_attention_heads=HEADS, q_lora_rank=256)
    model = replace(
        v3, attention=attention, ffn=Dense(intermediate_size=1024), hidden_size=512, num_hidden_layers=1, vocab_size=1024,
        num_nextn_predict_layers=0, remat="full",
    )  # fmt: skip
    mesh, shape = make_mesh(MeshConfig(context=4), devices), (1, 4 * PLACES + 1)
    run = run_config(model, seq_len=4 * PLACES, batch_size=1, loss_chunk=2048)
    state, step = abstract_state(run, mesh), compile_train_step(run, mesh)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=named_sharding(mesh, BATCH_AXES, shape))
    with use_mesh(mesh):
        text = step.lower(state, {"tokens": ids, "segment_ids": ids}).compile().as_text() or ""
    report: dict[str, Any] = dict(
        kernels=text.count('custom_call_target="tpu_custom_call"'),
        moved=re.findall(r"= \(?\w+\[([\d,]+)\][^=]* collective-permute-start\(", text),
        shapes=sorted(set(re.findall(r"(?:bf16|f32)\[([\d,]+)\]", text))),
    )
    print(
        json.dumps({k: [list(map(int, x.split(","))) for x in v] if k != "kernels" else v for k, v in report.items()})
    )


if __name__ == "__main__":
    main()
