"""Speculative decoding: the same tokens as plain decoding, greedy and sampled, and the distribution that is asked for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import micro, random_variables

import deepseek_jax as dsj
from deepseek_jax.infer.engine import Engine, Request, Sampling


def _model():
    config = micro("v3", num_hidden_layers=2)
    return dsj.DeepSeek(config), random_variables(config)


def test_the_same_tokens_as_plain_decoding():
    """Greedy, sampled, truncated and penalised requests side by side, over fewer slots than requests."""
    model, variables = _model()
    draw = np.random.default_rng(0)
    requests = [
        Request(
            prompt=draw.integers(0, 256, n).tolist(),
            sampling=Sampling(max_new_tokens=new, temperature=t, top_p=p, repetition_penalty=r, seed=n, stop_ids=(7,)),
        )
        for n, new, t, p, r in ((5, 20, 0, 1, 1), (17, 9, 0.7, 0.8, 1.2), (1, 1, 1, 1, 1), (40, 20, 0.2, 1, 1), (9, 2, 0, 1, 2))
    ]  # fmt: skip
    shape = dict(slots=2, places=64, chunk=16, decode_steps=4)
    plain = Engine(model, variables, **shape).generate(requests)
    drafted = Engine(model, variables, speculate=True, **shape).generate(requests)
    for a, b in zip(plain, drafted, strict=True):
        assert a.tokens == b.tokens and a.finish_reason == b.finish_reason
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        np.testing.assert_allclose(a.sampled_logprobs, b.sampled_logprobs, atol=1e-5)
    assert 0 < sum(g.accepted for g in drafted) < sum(g.drafts for g in drafted)  # both ways of a step were taken


def test_right_drafts_halve_the_steps():
    """A model whose next token follows from the last one alone, and whose module knows it: every draft is right."""
    model, variables = _model()
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if path[1].key in ("dense_layers", "moe_layers", "mtp") else leaf,
        variables,
    )
    D = model.config.hidden_size
    module = variables["params"]["mtp"]
    module["w_proj"] = jnp.concatenate([jnp.eye(D), jnp.zeros((D, D))])[None]
    for norm in ("embedding_norm", "norm"):
        module[norm]["scale"] = jnp.ones((1, D))
    variables["params"]["final_norm"]["scale"] = jnp.ones(D)
    [result] = dsj.generate(model, variables, [[3]], max_new_tokens=31, speculate=True, stop_ids=())
    assert result.accepted == result.drafts == 15
    assert result.tokens == dsj.generate(model, variables, [[3]], max_new_tokens=31, stop_ids=())[0].tokens


def test_the_distribution_over_many_seeds():
    """Chi-square of 3,000 continuations of two tokens, out of 3 allowed each, against the model's exact probabilities."""
    model, variables = _model()
    choices, prompt, temperature, count = (5, 80, 200), [9, 4], 1.5, 3000
    allowed = np.zeros(256, bool)
    allowed[list(choices)] = True
    pairs = list(itertools.product(choices, choices))
    logits = model.apply(variables, jnp.array([[*prompt, *pair] for pair in pairs])).logits[:, :, np.array(choices)]
    logp = jax.nn.log_softmax(logits / temperature)
    expected = [
        float(jnp.exp(logp[i, 1, choices.index(a)] + logp[i, 2, choices.index(b)])) for i, (a, b) in enumerate(pairs)
    ]
    engine = Engine(model, variables, slots=64, places=8, decode_steps=1, speculate=True)
    results = engine.generate(
        [
            Request(
                prompt=prompt, allowed=allowed, sampling=Sampling(max_new_tokens=3, temperature=temperature, seed=s)
            )
            for s in range(count)
        ]
    )
    assert 0.1 < sum(result.accepted for result in results) / sum(result.drafts for result in results) < 0.9
    seen = [sum(tuple(result.tokens[:2]) == pair for result in results) for pair in pairs]
    chi_square = sum((s - count * e) ** 2 / (count * e) for s, e in zip(seen, expected, strict=True))
    assert chi_square < 26.1  # 8 degrees of freedom: exceeded once in a thousand


def test_a_model_without_a_module_is_refused():
    model = dsj.DeepSeek(micro("llm"))
    with pytest.raises(ValueError, match="speculate = True: .* has no multi-token module"):
        Engine(model, None, places=64, speculate=True)
