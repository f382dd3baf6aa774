"""Greedy continuations of loaded checkpoints, 64 tokens: those of transformers, with multi-token drafts and without.

`deepseek` (MoE 16B) has no class there and is held against the literal forward pass. Skipped where torch or transformers
5.23 is missing: the `parity` extra.
"""

import checkpoint_draws as draws
import literal_checkpoints as literal
import numpy as np
import pytest

import deepseek_jax as dsj
from deepseek_jax.infer.engine import Engine, Request
from deepseek_jax.infer.sampling import Sampling
from deepseek_jax.interop.load import load_hf

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
NEW = 64


def their_tokens(transformers, folder, prompt, **how) -> tuple[list[int], float]:
    """The greedy continuation, and how near its nearest choice was to another."""
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    layers = model.config.num_hidden_layers  # transformers spells the module's tensors for the 61 layers of V3
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layers}\..*"]
    out = model.generate(
        torch.tensor([prompt]), do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, eos_token_id=None,
        output_logits=True, return_dict_in_generate=True, **how,
    )  # fmt: skip
    best = torch.stack(out.logits)[:, 0].topk(2, -1)[0]
    return out.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())


def literal_tokens(config, tensors, prompt) -> tuple[list[int], float]:
    """As `their_tokens`, by the literal forward pass."""
    tokens, gap = list(prompt), np.inf
    for _ in range(NEW):
        logits = literal.logits(config, tensors, np.asarray(tokens))[0][-1]
        second, first = np.sort(logits)[-2:]
        tokens, gap = [*tokens, int(logits.argmax())], min(gap, first - second)
    return tokens[len(prompt) :], gap


def written(folder, kind, seed, **fields):
    """(config, tensors, prompt) of a checkpoint that reaches far enough for the continuation."""
    draw = np.random.default_rng([seed, literal.KINDS.index(kind)])
    config = draws.wide_config(kind, draw) | fields
    tensors = literal.random_tensors(config, draw)
    literal.write(folder, config, tensors)
    return config, tensors, draw.integers(0, config["vocab_size"], 9).tolist()


@pytest.mark.parametrize("kind", literal.KINDS)
def test_greedy_continuations(transformers, kind, tmp_path):
    for seed in range(20):
        config, tensors, prompt = written(tmp_path, kind, seed)
        if kind == "deepseek":
            theirs, gap = literal_tokens(draws.plainly(config), tensors, prompt)
        else:
            theirs, gap = their_tokens(transformers, tmp_path, prompt)
        if gap > 1e-3:
            break
    model, variables = load_hf(tmp_path, progress=False)
    [ours] = dsj.generate(model, variables, [prompt], max_new_tokens=NEW, stop_ids=())
    assert list(ours.tokens) == theirs


def test_drafts_of_the_multi_token_module_change_nothing(transformers, tmp_path):
    for seed in range(20):
        _, _, prompt = written(tmp_path, "deepseek_v3", seed, num_nextn_predict_layers=1)
        theirs, gap = their_tokens(transformers, tmp_path, prompt)
        if gap > 1e-3:
            break
    drafted, _ = their_tokens(transformers, tmp_path, prompt, use_mtp=True)
    model, variables = load_hf(tmp_path, progress=False)
    engine = Engine(model, variables, slots=1, places=128, speculate=True)
    [ours] = engine.generate([Request(prompt=prompt, sampling=Sampling(max_new_tokens=NEW))])
    assert list(ours.tokens) == drafted == theirs
