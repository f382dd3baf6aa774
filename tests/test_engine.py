"""The engine against the plain sampler, and requests that share a batch against requests alone."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import micro, random_variables

import deepseek_jax as dsj
from deepseek_jax.infer import programs
from deepseek_jax.infer.engine import Engine, Request
from deepseek_jax.infer.reference import generate_reference
from deepseek_jax.infer.sampling import Sampling, sample, settings

LENGTHS = (5, 17, 1, 40, 9, 3)


def _model(kind):
    config = micro(kind, num_hidden_layers=2)
    model = dsj.DeepSeek(config)
    draw = np.random.default_rng(0)
    return model, random_variables(config), [draw.integers(0, config.vocab_size, n).tolist() for n in LENGTHS]


@pytest.mark.parametrize("kind", ["llm-gqa", "v3"])
def test_greedy_equals_the_plain_sampler(kind):
    """Six prompts over three slots, some longer than a chunk; stop ids hit at different times."""
    model, variables, prompts = _model(kind)
    expected = generate_reference(model, variables, prompts, max_new_tokens=20, stop_ids=())
    stop = expected[1].tokens[7]  # ends that one, and perhaps others
    expected = generate_reference(model, variables, prompts, max_new_tokens=20, stop_ids=(stop,))
    engine = Engine(model, variables, slots=3, places=64, chunk=16, decode_steps=4, prefill_rows=2)
    results = engine.generate(
        [Request(prompt=prompt, sampling=Sampling(max_new_tokens=20, stop_ids=(stop,))) for prompt in prompts]
    )
    assert min(len(result.tokens) for result in results) < 20
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
        assert set(ours.sampled_logprobs) == {0.0}


def test_a_request_does_not_depend_on_its_neighbours():
    """Bit for bit: the same slots, so the same programs, whoever else is in them; and few programs in all."""
    model, variables, prompts = _model("v3")
    for program in (programs.prefill, programs.decode, programs.enter):
        program.clear_cache()
    engine = Engine(model, variables, slots=3, places=64, chunk=16)
    requests = [
        Request(
            prompt=prompt,
            sampling=Sampling(max_new_tokens=12, temperature=0.9, top_p=0.9, top_k=50, seed=i, repetition_penalty=1.1),
        )
        for i, prompt in enumerate(prompts)
    ]
    requests.append(
        Request(prompt=[3], sampling=Sampling(max_new_tokens=12, temperature=0.05, seed=3))
    )  # whole distribution
    together = engine.generate(requests)
    assert [engine.generate([request])[0] for request in requests] == together
    assert len({tuple(result.tokens) for result in together}) == len(requests)
    # Chunks of 8 and 16, fresh and not; to enter a slot and to decode, one program for each kind of draw.
    assert programs.prefill._cache_size() <= 4
    assert programs.decode._cache_size() == programs.enter._cache_size() == 2


def test_sampling_settings_by_hand():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    nothing = jnp.zeros((1, 4), bool)

    def drawn(**fields):
        rows = jnp.repeat(logits, 2000, axis=0)
        given = settings([Sampling(seed=seed, **fields) for seed in range(2000)], ~jnp.repeat(nothing, 2000, axis=0))
        draws = Sampling(**fields).draws
        tokens, raw, sampled = sample(rows, given, jnp.repeat(nothing, 2000, axis=0), jnp.zeros(2000, jnp.int32), draws)
        np.testing.assert_allclose(np.exp(raw), np.array([0.4, 0.3, 0.2, 0.1])[np.asarray(tokens)], rtol=1e-5)
        return np.bincount(tokens, minlength=4) / 2000, dict(
            zip(np.asarray(tokens).tolist(), np.exp(sampled).tolist(), strict=True)
        )

    for fields, expected in (
        (dict(temperature=1.0), [0.4, 0.3, 0.2, 0.1]),
        (dict(temperature=0.5), np.array([16, 9, 4, 1]) / 30),
        (dict(temperature=1.0, top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (dict(temperature=1.0, top_p=0.65), [4 / 7, 3 / 7, 0, 0]),
        (dict(temperature=1.0, min_p=0.45), [4 / 9, 3 / 9, 2 / 9, 0]),
        (dict(temperature=1.0, top_k=2, top_p=0.55), [1, 0, 0, 0]),  # 0.4 is 0.57 of what two leave
        (dict(temperature=0.0), [1, 0, 0, 0]),
    ):
        shares, probabilities = drawn(**fields)
        np.testing.assert_allclose(shares, expected, atol=0.04, err_msg=str(fields))
        if fields["temperature"]:
            for token, probability in probabilities.items():
                assert probability == pytest.approx(expected[token], rel=1e-4), fields
    ties = settings([Sampling(temperature=1.0, top_k=2)] * 200, np.ones((200, 4), bool), range(200))
    equal = sample(jnp.zeros((200, 4)), ties, jnp.zeros((200, 4), bool), jnp.zeros(200, jnp.int32), "truncated")[0]
    assert set(np.asarray(equal).tolist()) == {0, 1}
    seen, start = jnp.array([[True, False, False, False]]), jnp.zeros(1, jnp.int32)
    given = settings([Sampling(repetition_penalty=2.0)], ~nothing)
    assert int(sample(logits + 2, given, seen, start, "nothing")[0][0]) == 1
    assert int(sample(logits + 2, given, nothing, start, "nothing")[0][0]) == 0
    given = settings([Sampling(temperature=1.0)], jnp.array([[False, False, False, True]]))
    assert [np.asarray(x).tolist() for x in sample(logits, given, nothing, start, "whole")] == [[3], [0.0], [0.0]]


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(prompt=[]), "prompt 0 is empty"),
        (dict(prompt=[999]), "prompt 0 has ids outside the vocabulary of 256"),
        (dict(prompt=[1] * 60), "60 tokens and max_new_tokens = 8 are more than the 64 places"),
    ],
)
def test_bad_requests_are_named_before_anything_runs(change, said):
    model = dsj.DeepSeek(micro("llm"))
    engine = Engine(model, None, slots=1, places=64)
    with pytest.raises(ValueError, match=said):
        engine.generate([Request(prompt=change["prompt"], sampling=Sampling(max_new_tokens=8))])


def test_bad_settings_are_named():
    for field, value in (("temperature", -1.0), ("top_p", 0.0), ("min_p", 2.0), ("max_new_tokens", 0), ("seed", -1)):
        with pytest.raises(ValueError, match=f"Sampling.{field} = {value}"):
            Sampling(**{field: value})
    model = dsj.DeepSeek(micro("llm"))
    with pytest.raises(ValueError, match="slots = 0"):
        Engine(model, None, slots=0)
    with pytest.raises(ValueError, match="places = 4096: .* max_position_embeddings = 128"):
        Engine(model, None, places=4096)


def test_generate_is_the_engine():
    model, variables, prompts = _model("llm-gqa")
    assert dsj.generate(model, variables, [], max_new_tokens=3) == []
    results = dsj.generate(model, variables, prompts[:2], max_new_tokens=6, top_k=5, temperature=1.0, seed=3)
    alone = dsj.generate(model, variables, prompts[1:2], max_new_tokens=6, top_k=5, temperature=1.0, seed=3)
    assert results[1].tokens == alone[0].tokens
    with pytest.raises(ValueError, match="more than max_position_embeddings = 128"):
        dsj.generate(model, variables, [[1] * 128], max_new_tokens=1)
