"""What a request can ask for: samples, stop texts, allowed tokens, experts, an end; and an engine on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import micro, random_variables
from marks import study

import deepseek_jax as dsj
from deepseek_jax.data.tokenizer import byte_tokenizer
from deepseek_jax.infer import programs
from deepseek_jax.infer.engine import Engine, Request, Sampling
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh, use_mesh
from deepseek_jax.posttrain.rollout import require_same


@pytest.fixture(scope="module")
def v3():
    config = micro("v3", num_hidden_layers=2, vocab_size=259)
    return dsj.DeepSeek(config), random_variables(config)


PROMPT = [5, 60, 7, 100]


def test_samples_share_a_prefill(v3, monkeypatch):
    """More samples than slots, one prefill; each is what its place in the row makes it, and the first what one alone is."""
    prefills = []
    prefill = programs.prefill
    monkeypatch.setattr(programs, "prefill", lambda *arguments: prefills.append(1) or prefill(*arguments))
    engine = Engine(*v3, slots=2, places=32)
    sampling = Sampling(max_new_tokens=8, temperature=1.0, seed=4)
    five = engine.generate([Request(prompt=PROMPT, sampling=sampling, samples=5)])
    assert len(prefills) == 1
    [alone] = engine.generate([Request(prompt=PROMPT, sampling=sampling)])
    assert five[0] == alone
    assert len({tuple(result.tokens) for result in five}) == 5
    three = engine.generate([Request(prompt=PROMPT, sampling=sampling, samples=3)])
    assert three == five[:3]


def test_prompts_of_one_seed_have_their_own_noise(v3):
    """And the same prompt has the same: nothing depends on the order."""
    model, variables = v3
    variables = jax.tree.map(jnp.zeros_like, variables)  # every token is as likely, whatever the prompt
    results = dsj.generate(model, variables, [[1], [2], [1]], max_new_tokens=8, temperature=1.0, stop_ids=())
    assert results[0].tokens == results[2].tokens != results[1].tokens


def test_stop_texts_end_a_text_before_them(v3):
    tokenizer = byte_tokenizer()
    engine = Engine(*v3, slots=1, places=64, tokenizer=tokenizer)
    how = dict(max_new_tokens=24, temperature=1.0, seed=1)
    [whole] = engine.generate([Request(prompt=PROMPT, sampling=Sampling(**how))])
    assert whole.finish_reason == "length" and whole.text == tokenizer.decode(whole.tokens, skip_special=True)
    stop = whole.text[7:9]
    [stopped] = engine.generate([Request(prompt=PROMPT, sampling=Sampling(**how, stop=(stop,)))])
    assert stopped.finish_reason == "stop" and stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.tokens == whole.tokens[: len(stopped.tokens)] and len(stopped.tokens) < 24
    with pytest.raises(ValueError, match="stop = .'x',. of the prompt: texts need an engine with a tokenizer"):
        Engine(*v3, slots=1, places=64).submit(Request(prompt=PROMPT, sampling=Sampling(max_new_tokens=4, stop=("x",))))


def test_allowed_tokens(v3):
    allowed = np.zeros(259, bool)
    allowed[[3, 8]] = True
    engine = Engine(*v3, slots=1, places=32)
    [result] = engine.generate(
        [Request(prompt=PROMPT, allowed=allowed, sampling=Sampling(max_new_tokens=10, temperature=3.0))]
    )
    assert set(result.tokens) == {3, 8}
    for wrong, said in ((np.ones(4, bool), "must be 259 bools"), (~np.ones(259, bool), "allows no token")):
        with pytest.raises(ValueError, match=f"allowed of the prompt {said}"):
            engine.submit(Request(prompt=PROMPT, allowed=wrong, sampling=Sampling(max_new_tokens=4)))


def test_a_cancelled_request_frees_its_slot(v3):
    engine = Engine(*v3, slots=1, places=64, decode_steps=2)
    long = Sampling(max_new_tokens=40)
    [running] = engine.submit(Request(prompt=PROMPT, sampling=long))
    [waiting] = engine.submit(Request(prompt=PROMPT[:2], sampling=long))
    [last] = engine.submit(Request(prompt=PROMPT[:3], sampling=Sampling(max_new_tokens=3)))
    engine.step()
    assert len(running.tokens) == 3 and not waiting.tokens and engine.waiting == 2
    engine.cancel(waiting)
    engine.cancel(running)
    while engine.busy:
        engine.step()
    assert [g.finish_reason for g in (running, waiting, last)] == ["cancelled", "cancelled", "length"]
    assert len(running.tokens) == 3 and not waiting.tokens and len(last.tokens) == 3


@pytest.mark.parametrize("speculate", [study(False), True])
def test_experts_are_those_of_the_forward_pass(v3, speculate):
    """Of every token that was run: as many of each expert as the router of the whole sequence counts."""
    model, variables = v3
    engine = Engine(model, variables, slots=2, places=64, chunk=8, record_experts=True, speculate=speculate)
    requests = [Request(prompt=PROMPT * n, sampling=Sampling(max_new_tokens=9, temperature=1.0)) for n in (1, 3, 2)]
    for request, result in zip(requests, engine.generate(requests), strict=True):
        tokens = jnp.array([[*request.prompt, *result.tokens[:-1]]])
        load = model.apply(variables, tokens).router["moe_layers"].load
        assert result.experts.shape == (
            tokens.shape[1],
            model.config.num_moe_layers,
            model.config.ffn.num_experts_per_tok,
        )
        counted = np.stack(
            [np.bincount(column.ravel(), minlength=load.shape[1]) for column in result.experts.swapaxes(0, 1)]
        )
        np.testing.assert_array_equal(counted, load)
    with pytest.raises(ValueError, match="record_experts = True: .* has no experts"):
        Engine(dsj.DeepSeek(micro("llm")), None, places=64, record_experts=True)


@pytest.mark.parametrize(
    "kind, mesh, looped",
    [("v3", dict(data=2, expert=2, tensor=2), True), ("llm-gqa", dict(data=2, fsdp=2, tensor=2), False)],
)
def test_the_same_tokens_on_a_mesh(kind, mesh, looped):
    if jax.default_backend() != "cpu":
        pytest.skip("needs eight devices: the CPU's virtual ones")
    config = micro(kind, num_hidden_layers=2)
    model, variables = dsj.DeepSeek(config), random_variables(config)
    prompts = [[5, 60, 7, 100], [9], list(range(20))]
    sampling = Sampling(max_new_tokens=10, temperature=0.7, seed=2)
    requests = [Request(prompt=prompt, sampling=sampling) for prompt in prompts]
    options = dict(slots=4, places=32, prefill_rows=3, speculate=kind == "v3")
    expected = Engine(model, variables, **options).generate(requests)
    with use_mesh(make_mesh(MeshConfig(**mesh))) as devices:
        from deepseek_jax.models.counts import abstract_variables
        from deepseek_jax.parallel.rules import tree_shardings

        sharded = jax.device_put(variables, tree_shardings(devices, abstract_variables(config)))
        engine = Engine(model, sharded, loop_layers=looped, **options)
        results = engine.generate(requests)
        require_same(model, sharded, engine.weights)
    assert [r.tokens for r in results] == [e.tokens for e in expected]


def test_ends_at_the_first_token(v3):
    """Nothing is decoded for them; a stop text of one token, a stop id, and one token at most."""
    tokenizer = byte_tokenizer()
    engine = Engine(*v3, slots=2, places=32, record_experts=True, tokenizer=tokenizer)
    [letter] = tokenizer.encode("a")
    only = np.arange(259) == letter
    how = (dict(max_new_tokens=1), dict(max_new_tokens=9, stop_ids=(letter,)), dict(max_new_tokens=9, stop=("a",)))
    results = engine.generate([Request(prompt=PROMPT, allowed=only, sampling=Sampling(**fields)) for fields in how])
    assert [r.tokens for r in results] == [[letter]] * 3 and not engine.busy
    assert [r.text for r in results] == ["a", "", ""]
    assert [r.finish_reason for r in results] == ["length", "stop", "stop"]
    assert {len(r.experts) for r in results} == {len(PROMPT)}


def test_a_chunk_is_never_wider_than_the_model():
    config = micro("llm-gqa", num_hidden_layers=2, max_position_embeddings=100)
    model, variables = dsj.DeepSeek(config), random_variables(config)
    prompt = np.arange(70)
    [short] = dsj.generate(model, variables, [prompt], max_new_tokens=30, stop_ids=())
    [again] = Engine(model, variables, places=100, chunk=16).generate(
        [Request(prompt=prompt, sampling=Sampling(max_new_tokens=30))]
    )
    assert short.tokens == again.tokens and len(short.tokens) == 30


def test_an_interrupted_step_cancels_everything(v3, monkeypatch):
    engine = Engine(*v3, slots=1, places=64, decode_steps=4)
    request = Request(prompt=PROMPT, sampling=Sampling(max_new_tokens=20))
    [expected] = engine.generate([request])
    [running], [waiting] = engine.submit(request), engine.submit(request)
    engine.step()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(jax, "device_get", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        engine.step()
    assert running.finish_reason == waiting.finish_reason == "cancelled" and not engine.busy
    assert engine.generate([request]) == [expected]


def test_the_engine_keeps_what_it_was_given(v3):
    """The caller may change a prompt or a mask, and give its variables away."""
    model, variables = v3
    mine = jax.tree.map(jnp.array, variables)
    engine = Engine(model, mine, slots=1, places=32)
    jax.tree.map(lambda leaf: leaf.delete(), mine)
    allowed, prompt = [i == 5 for i in range(259)], list(PROMPT)
    [result] = engine.submit(Request(prompt=prompt, allowed=allowed, sampling=Sampling(max_new_tokens=2)))
    allowed[5], allowed[9] = False, True
    prompt += [1] * 60
    while engine.busy:
        engine.step()
    assert result.tokens == [5, 5]


def test_consumed_variables_are_gone(v3):
    model, variables = v3
    [expected] = dsj.generate(model, variables, [PROMPT], max_new_tokens=5)
    mine = jax.tree.map(lambda leaf: np.asarray(leaf), variables)
    mine = jax.tree.map(jnp.array, mine)
    layers = mine["params"]["moe_layers"]["ffn"]["experts"]
    layers["w_up"] = layers["w_gate"]  # one array in two places
    Engine(model, mine, slots=1, places=32, consume=True)
    assert layers["w_up"].is_deleted()
    numpy_variables = jax.tree.map(np.asarray, variables)
    assert dsj.generate(model, numpy_variables, [PROMPT], max_new_tokens=5) == [expected]


def test_programs_with_experts_stay_few(v3):
    engine = Engine(*v3, slots=1, places=64, chunk=16, record_experts=True)
    programs.prefill.clear_cache()
    engine.generate([Request(prompt=[1] * n, sampling=Sampling(max_new_tokens=2)) for n in range(1, 40, 3)])
    assert programs.prefill._cache_size() <= 4


def test_impossible_numbers_are_named(v3):
    for fields, said in (
        (dict(vocab_size=0), "vocab_size = 0: must be at least 1"),
        (dict(vocab_size=-5), "vocab_size = -5: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            Engine(*v3, places=64, **fields)
    for field, value in (
        ("temperature", float("inf")),
        ("temperature", 1e39),
        ("top_k", 2**31),
        ("max_new_tokens", 2.5),
    ):
        with pytest.raises(ValueError, match=f"Sampling.{field} = "):
            Sampling(**{field: value})
    assert Engine(*v3, places=64, tokenizer=byte_tokenizer()).vocab_size == 259
    with pytest.raises(ValueError, match="samples = 0"):
        dsj.generate(*v3, [PROMPT], max_new_tokens=2, samples=0)
