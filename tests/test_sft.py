"""Fine-tuning: the loss of packed conversations, a run from published weights to published weights, exact resume."""

import json
import shutil
import textwrap
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import micro, random_variables, run_config
from marks import needs_8
from test_chat_data import pad_is_eos, talk, write

import deepseek_jax as dsj
from deepseek_jax.chat.data import ChatData, ChatJsonl
from deepseek_jax.chat.dataset import load_chats
from deepseek_jax.cli.main import main
from deepseek_jax.data.tokenizer import byte_tokenizer
from deepseek_jax.infer.generate import generate
from deepseek_jax.metrics.writer import read_jsonl
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.posttrain.common import Rate
from deepseek_jax.posttrain.sft import SFT, prepare, schedule_of
from deepseek_jax.training.begin import fresh
from deepseek_jax.training.lora import LoRA
from deepseek_jax.training.loss import loss_parts, make_totals
from deepseek_jax.training.schedule import rates
from deepseek_jax.training.state import abstract_state, init_state
from deepseek_jax.training.step import make_train_step

flat: Any = jax.tree_util.tree_leaves_with_path
ANSWERS = {"a": "red", "b": "blue", "c": "green", "d": "red", "e": "blue", "f": "green"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A published checkpoint of a small model, whose tokenizer pads with its end of text."""
    folder = tmp_path_factory.mktemp("base") / "hf"
    model = micro("llm", vocab_size=288, num_hidden_layers=2)
    return dsj.save_hf(
        folder, dsj.DeepSeek(model), random_variables(model, scale=0.05), "float32", tokenizer=pad_is_eos(),
        progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    return write(tmp_path_factory.mktemp("talks") / "talks.jsonl", [talk(q, a) for q, a in ANSWERS.items()])


def config(base, talks, **fields: Any) -> SFT:
    defaults: dict[str, Any] = dict(
        init_from=str(base), template="v3", data=ChatData(sources=(ChatJsonl(path=talks),), held_out_fraction=0.0),
        batch_size=8, seq_len=24, epochs=2, rate=Rate(peak=1e-2, shape="cosine", warmup_steps=2), loss_chunk=8,
    )  # fmt: skip
    return SFT(**(defaults | fields))


def test_packed_loss_is_the_sum_of_the_unpacked(tmp_path):
    """On a model with routers and a multi-token module, next-token and multi-token loss."""
    tokenizer = pad_is_eos()
    file = str(tokenizer.save(tmp_path / "tokenizer.json"))
    path = write(tmp_path / "a.jsonl", [talk("q" * (i % 4 + 1), "word " * (i % 3) + "end") for i in range(7)])
    run = run_config(micro("v3", vocab_size=288, num_hidden_layers=2), batch_size=8)
    variables = random_variables(run.model)

    @jax.jit
    def parts(batch):
        totals = make_totals(batch, 1, jnp.float32)
        losses = loss_parts(run, variables["params"], variables["router"], batch, totals, 0.0)[1]
        return losses.main * totals.tokens[0], losses.mtp[0] * totals.tokens[1], totals.tokens

    sums = {}
    for packing in (True, False):
        data = ChatData(
            sources=(ChatJsonl(path=path),), template="v3", tokenizer=file, packing=packing, held_out_fraction=0.0
        )
        windows = load_chats(data, 40, None, progress=False).train.sources[0]
        assert (len(windows) < 5) == packing
        rows = [windows[i] for i in range(len(windows))]
        rows += [{k: np.zeros_like(x) for k, x in rows[0].items()}] * (8 - len(rows))
        sums[packing] = parts({k: jnp.asarray(np.stack([row[k] for row in rows])) for k in rows[0]})
    # Tokens learned: each answer and its end; by the multi-token module too, which sees the token before the answer.
    learned = sum(5 * (i % 3) + 3 + 1 for i in range(7))
    assert sums[True][2].tolist() == sums[False][2].tolist() == [learned, learned]
    np.testing.assert_allclose(sums[True][:2], sums[False][:2], rtol=1e-5)


def test_fine_tunes_published_weights_and_goes_on_bit_for_bit(base, tmp_path):
    """From an HF folder to an HF folder, on a mixture of packed sources; killed after half of its steps, it is the same
    run."""
    rows = [talk(q, a) for q, a in ANSWERS.items()]
    one, two = write(tmp_path / "one.jsonl", rows[:3]), write(tmp_path / "two.jsonl", rows[3:])
    file = tmp_path / "tune.py"
    file.write_text(
        textwrap.dedent(
            f"""
            import deepseek_jax as dsj
            from deepseek_jax.posttrain.common import Rate

            def get_config():
                return dsj.SFT(
                    init_from={str(base)!r}, template="v3", batch_size=8, seq_len=24, epochs=40, loss_chunk=8,
                    data=dsj.ChatData(
                        sources=(dsj.ChatJsonl(path={one!r}), dsj.ChatJsonl(path={two!r}, weight=2.0)),
                        held_out_fraction=0.2,
                    ),
                    rate=Rate(peak=1e-2, shape="cosine"), log_every=5, eval_every=15, checkpoint_every=15,
                )
            """
        )
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(["sft", str(file), "--run-dir", str(whole), "--data.held-out-fraction", "0.0"]) == 0
    lines = read_jsonl(whole / "metrics.jsonl")
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["template"] == "v3" and manifest["config"]["data"]["type"] == "ChatData"
    assert lines[-1]["step"] == 30 and lines[-1]["loss"] < 0.1 * lines[1]["loss"]
    assert manifest["data"]["epoch_windows"] == 2 + 2 * 2  # of two conversations and of one, the second source twice

    loaded = dsj.open_model(whole)
    prompts = [
        loaded.template.encode(loaded.tokenizer, [{"role": "user", "content": question}]).ids for question in ANSWERS
    ]
    stop = loaded.template.stop_ids(loaded.tokenizer)
    results = generate(
        loaded.model, loaded.variables, prompts, max_new_tokens=8, stop_ids=stop, tokenizer=loaded.tokenizer
    )
    assert [result.text for result in results] == list(ANSWERS.values())
    assert all(result.finish_reason == "stop" for result in results)  # the end was learned though padding has its id

    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "30")
    assert main(["sft", str(file), "--run-dir", str(broken), "--data.held-out-fraction", "0.0"]) == 0
    times = ("tokens_per_second", "mfu")
    for ours, theirs in zip(read_jsonl(broken / "metrics.jsonl"), lines, strict=True):
        assert {k: v for k, v in ours.items() if k not in times} == {k: v for k, v in theirs.items() if k not in times}
    again = dsj.load_run(broken)
    jax.tree.map(np.testing.assert_array_equal, again.variables, loaded.variables)

    assert main(["convert", str(whole), str(tmp_path / "hf"), "--dtype", "float32"]) == 0
    published = dsj.open_model(tmp_path / "hf", dtype="float32")
    assert published.template.name == "v3"  # its tokens alone would say R1
    jax.tree.map(np.testing.assert_array_equal, published.variables, loaded.variables)
    assert main(["sft", str(file), "--run-dir", str(broken)]) == 2  # other data: what is held out is not trained on


def test_begins_with_a_run_of_routers(talks, tmp_path):
    """Whose parameters are kept in another dtype than those that are tuned, and which names no template."""
    model = micro("v3", vocab_size=288, num_hidden_layers=2)
    variables = random_variables(model, scale=0.05)
    hf = dsj.save_hf(tmp_path / "hf", dsj.DeepSeek(model), variables, "float32", tokenizer=pad_is_eos(), progress=False)
    assert main(["convert", str(hf), str(tmp_path / "base"), "--dtype", "bfloat16"]) == 0
    with pytest.raises(ValueError, match="SFT.template = None: .*base names none of ours; give one of llm, coder"):
        prepare(config(tmp_path / "base", talks, template=None), progress=False)
    run, data = prepare(config(tmp_path / "base", talks, mtp="drop", dtype="float32"), progress=False)
    data.tokenizer.save(tmp_path / "run/tokenizer.json")
    state = fresh(run, make_mesh(run.mesh), tmp_path / "run", print)
    without = {name: {k: v for k, v in tree.items() if k != "mtp"} for name, tree in variables.items()}
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), without["params"])
    jax.tree.map(np.testing.assert_array_equal, state.params, expected)
    jax.tree.map(np.testing.assert_array_equal, state.router, without["router"])
    assert not rates(run)[:, 2].any()  # and so they stay
    kept = prepare(config(hf, talks), progress=False)[0]
    assert kept.model.num_nextn_predict_layers == 1 and kept.mtp_loss_weight == 0.1
    assert kept.last_step == 1  # 2 epochs of 3 windows in batches of 8


@pytest.mark.parametrize("rate", [Rate(peak=2.0), Rate(peak=5e-6, shape="cosine", warmup_steps=3, final=0.2)])
def test_schedule_is_the_rate_at_every_step(rate):
    run = run_config(micro("llm"), schedule=schedule_of(rate, 11, 8 * 16), steps=11)
    np.testing.assert_allclose(rates(run)[:, 0], [rate.at(step, 11) for step in range(11)], rtol=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 3}, "SFT.epochs = 2: give epochs or steps"),
        ({"epochs": 0}, "SFT.epochs = 0: must be greater than 0"),
        ({"mtp": "no"}, "SFT.mtp = 'no'"),
        ({"init_from": "nowhere"}, "SFT.init_from = 'nowhere' has neither manifest.json"),
        ({"template": "v9"}, "template='v9' is not known"),
        ({"template": "coder", "seq_len": 2000}, "RunConfig.seq_len = 2000: must not exceed the model's max_position"),
        ({"seq_len": 3}, r"source 'talks' holds nothing to learn from; left out: 6 longer than seq_len \+ 1"),
    ],
)
def test_refusals(base, talks, fields, message):
    with pytest.raises(ValueError, match=message):
        prepare(config(base, talks, **fields), progress=False)


def test_one_template(base, talks, tmp_path):
    data = ChatData(sources=(ChatJsonl(path=talks),), template="llm")
    with pytest.raises(ValueError, match="SFT.template = 'v3': differs from data.template = 'llm': name it once"):
        config(base, talks, data=data)
    assert prepare(config(base, talks, data=data, template=None), progress=False)[1].template == "llm"
    assert prepare(config(base, talks, template=None), progress=False)[1].template == "r1"  # that of its tokens

    bare = shutil.copytree(base, tmp_path / "bare")
    byte_tokenizer().save(bare / "tokenizer.json")
    with pytest.raises(ValueError, match="template = 'v3' does not fit the tokenizer"):
        prepare(config(bare, talks), progress=False)


def test_adapters_alone_are_trained_and_merge():
    targets = ("w_q", "w_v", "w_o", "w_down")
    run = run_config(micro("llm", num_hidden_layers=1), lora=LoRA(rank=3, alpha=6.0, targets=targets), batch_size=2)
    first = init_state(run)
    before = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat(first.params)}
    batch = {"tokens": jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 17)), jnp.int32)}
    step = jax.jit(make_train_step(run))
    state, metrics = step(first, batch)
    losses = [metrics["loss"]]
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    assert losses[-1] < losses[0]
    adapters = {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in flat(state.lora["adapters"])}
    sums = {"w_q": "ldr,lrnh->ldnh", "w_v": "ldr,lrnh->ldnh", "w_o": "lnhr,lrd->lnhd", "w_down": "lfr,lrd->lfd"}
    changed = set()
    for path, leaf in flat(state.params):
        key, name = jax.tree_util.keystr(path), path[-1].key
        expected = before[key]
        if name in targets:
            expected = expected + 2.0 * np.einsum(sums[name], adapters[f"{key}['a']"], adapters[f"{key}['b']"])
            assert np.abs(leaf - before[key]).max() > 1e-4
            changed.add(name)
            np.testing.assert_allclose(leaf, expected, atol=1e-6)
        else:
            np.testing.assert_array_equal(leaf, expected)
    assert changed == set(targets) and len(adapters) == 2 * len(targets)
    for path, leaf in flat(state.lora["base"]):
        np.testing.assert_array_equal(leaf, before[jax.tree_util.keystr(path)])
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert moments < 2 * sum(leaf.size for leaf in jax.tree.leaves(state.lora["adapters"])) + 10


@needs_8
def test_adapters_of_experts_lie_on_a_mesh():
    run = run_config(micro("v3"), lora=LoRA(rank=2), mesh=MeshConfig(fsdp=2, expert=2, tensor=2))
    state = abstract_state(run, make_mesh(run.mesh))
    experts = state.lora["adapters"]["moe_layers"]["ffn"]["experts"]["w_down"]
    assert experts["a"].shape == (2, 8, 24, 2) and experts["b"].shape == (2, 8, 2, 32)
    assert tuple(experts["a"].sharding.spec) == (None, "expert", "tensor", None)
    assert state.lora["base"]["embed"] == state.params["embed"]
    with pytest.raises(ValueError, match=r"LoRA.targets = .'w_x',.: give some of w_q"):
        LoRA(targets=("w_x",))
    with pytest.raises(ValueError, match=r"LoRA.targets = .'w_q',.: the model has none of these matrices"):
        abstract_state(replace(run, lora=LoRA(targets=("w_q",))))
