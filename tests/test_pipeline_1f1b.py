"""1F1B: its ticks, what it keeps and for how long, and that this does not grow with the microbatches.

That it gives what one device gives is in test_pipeline_parallel.py.
"""

import functools
import itertools

import jax
import numpy as np
import pytest
from helpers import loss_and_gradients, micro, random_tokens, random_variables, run_config
from marks import needs_8

from deepseek_jax.parallel import MeshConfig, make_mesh, use_mesh
from deepseek_jax.parallel.one_f_one_b import place, places
from deepseek_jax.parallel.pipeline import Pipeline


def _ticks(S, V, M):
    """Of each chunk of the model and each microbatch the ticks of its forward and backward pass, and each group's tail's,
    as the head of parallel/one_f_one_b.py has them."""
    forward, backward, lag = {}, {}, S * V + S - 2
    for q, m in itertools.product(range(S * V), range(M)):
        back = S * V - 1 - q
        forward[q, m] = S * V * (m // S) + q // S * S + m % S + q % S
        backward[q, m] = lag + S * V * (m // S) + back // S * S + m % S + back % S
    return forward, backward, [lag + S * V * p for p in range(M // S)]


@pytest.mark.parametrize("S, V, M", [(2, 1, 2), (2, 1, 8), (4, 1, 16), (3, 2, 9), (4, 2, 16), (2, 3, 8), (4, 4, 12)])
def test_nothing_is_read_before_it_is_there_or_overwritten_before_it_is_read(S, V, M):
    forward, backward, tails = _ticks(S, V, M)
    for (q, m), t in forward.items():
        if q + 1 < S * V:
            assert forward[q + 1, m] == t + 1 and backward[q, m] == backward[q + 1, m] + 1, "handed over, not kept"
        else:
            # Tails come after the forward and before the backward passes of their tick.
            assert t <= tails[m // S] <= backward[q, m]
    for ticks in (forward, backward):
        for s in range(S):
            assert len({t for (q, _), t in ticks.items() if q % S == s}) == V * M, "one chunk a tick"
        assert max(ticks.values()) - min(ticks.values()) + 1 == M * V + S - 1
    # Stages go on after the last microbatch, so what would come next must not hurt either.
    later, _, _ = _ticks(S, V, M + 3 * S)
    where = np.asarray([[place(v, m, S, V) for m in range(M + 3 * S)] for v in range(V)])
    assert where.max() < sum(places(S, V)) and len({*where.ravel()}) == min(sum(places(S, V)), where.size)
    for q, m in backward:
        for p, n in later:
            if p % S == q % S and (p, n) != (q, m) and where[p // S, n] == where[q // S, m]:
                assert not forward[q, m] <= later[p, n] <= backward[q, m]
    assert places(S, 1) == [3 * S - 2] and sum(places(S, V)) < (1.5 * V + 2) * S


@needs_8
def test_what_a_stage_keeps_does_not_grow_with_the_microbatches():
    """The step's memory, of microbatches of one size, with 2 S of them and with 8 S."""
    S, rows, T = 2, 2, 128
    model = micro("llm-gqa", num_hidden_layers=8, remat="full")
    variables = random_variables(model)

    def needed(schedule, M):
        pipeline = Pipeline(microbatches=M, schedule=schedule)
        run = run_config(model, batch_size=rows * M, seq_len=T, mesh=MeshConfig(stage=S, data=1), pipeline=pipeline)
        batch = {"tokens": random_tokens(model, (run.batch_size, T + 1))}
        with use_mesh(make_mesh(run.mesh, jax.devices()[:S])):
            compiled = jax.jit(functools.partial(loss_and_gradients, run)).lower(variables, batch).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    def growth(schedule):
        return (needed(schedule, 8 * S) - needed(schedule, 2 * S)) / (6 * S)

    state = rows * T * model.hidden_size * 4
    layers = model.num_hidden_layers // S
    # What each stage has of the embedded tokens and the like is split over the stages.
    assert growth("1f1b") < 2 * state and growth("gpipe") > layers * state
