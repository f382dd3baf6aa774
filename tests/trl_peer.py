"""TRL's own trainers, run on given log-probabilities: what tests/test_trl_parity.py compares with."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np


class Given:
    """Stands for a model of TRL's trainers: the log-probabilities of row i are given, and row i begins with token i."""

    training, is_gradient_checkpointing = True, False

    def __init__(self, logp_BT):
        import torch

        self.logp = torch.tensor(np.asarray(logp_BT), dtype=torch.float64, requires_grad=True)

    def __call__(self, input_ids, labels, **_):
        logp = self.logp[input_ids[:, 0]].masked_fill(labels[:, 1:] == -100, 0)  # as TRL's own head does
        nothing = logp.detach() * 0
        return SimpleNamespace(log_probs=logp, entropy=nothing, mean_logits=nothing, is_top1=nothing > 0)


@contextmanager
def float64():
    """Whatever TRL makes without naming a dtype (rewards, what the sampler reported) is float64 inside."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def checkpoint(folder) -> str:
    """A model and tokenizer for the constructors, which no test runs."""
    import transformers
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(64)}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w63", pad_token="w62"
    ).save_pretrained(folder)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            eos_token_id=63, pad_token_id=62,
        )
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def grpo_trainer(trl, folder, rollouts, *, sampler: bool = False, **fields):
    """A `GRPOTrainer` whose rollouts are given; `fields` are `GRPOConfig`'s.

    Args:
        trl: the module.
        folder: from `checkpoint`.
        rollouts: as in tests/test_trl_parity.py.
        sampler: have the sampler's log-probabilities count, as with vLLM.
        fields: β may be one that needs a reference.
    """
    from datasets import Dataset

    lengths, mask = rollouts.lengths, rollouts.mask

    def rollout(prompts, trainer):
        return dict(
            prompt_ids=[[i] for i in range(len(lengths))],
            completion_ids=[[1] * int(n) for n in lengths],
            logprobs=[row[:n].tolist() for row, n in zip(rollouts.sampler, lengths, strict=True)] if sampler else None,
            env_mask=[row[:n].astype(int).tolist() for row, n in zip(mask, lengths, strict=True)],
        )

    def reward(completions, **_):
        return rollouts.rewards.tolist()

    beta = fields.pop("beta", 0.0)
    settings = dict(per_device_train_batch_size=len(lengths), num_generations=rollouts.group, num_iterations=2)
    config = trl.GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, report_to="none", **(settings | fields)
    )  # num_iterations: 2, so that the log-probabilities of the old policy are asked for
    trainer = trl.GRPOTrainer(
        folder, reward, config, Dataset.from_dict({"prompt": ["w1"] * len(lengths)}), rollout_func=rollout
    )
    trainer.model, trainer.ref_model, trainer.beta = Given(rollouts.old), Given(rollouts.reference), beta
    trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps
    if sampler:
        trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step
    return trainer


def trl_grpo(trl, folder, rollouts, rows=None, **fields):
    """Loss, its gradient by the log-probabilities [B, T], and advantages [B]; `rows`: those of one of several steps."""
    with float64():
        trainer = grpo_trainer(trl, folder, rollouts, **fields)
        batch = trainer._generate_and_score_completions([{"prompt": "w1"}] * len(rollouts.lengths))
        if rows is not None:
            batch = {name: x[rows] if x.ndim else x for name, x in batch.items()}
        policy = Given(rollouts.logp)
        loss = trainer.compute_loss(policy, batch)
        loss.backward()
    return loss.item(), policy.logp.grad.numpy(), batch["advantages"].numpy()


def trl_dpo(trl, folder, logp, reference, mask, *, beta: float, **fields):
    """Loss of `DPOTrainer` and its gradient by `logp`.

    Args:
        trl: the module.
        folder: from `checkpoint`.
        logp: [2, B, T] log-probability of each token under the policy: of the chosen and of the rejected completions.
        reference: the same under the reference.
        mask: bool [2, B, T]: tokens of the completions.
        beta: β.
        fields: more of `DPOConfig`'s, such as `loss_type`, ["sigmoid"] by default.

    Returns:
        Float, and float64 [2, B, T].
    """
    import torch
    from datasets import Dataset

    pairs, T = mask.shape[1:]
    config = trl.DPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        precompute_ref_log_probs=False,
        beta=beta,
        **fields,
    )
    rows = Dataset.from_dict({"prompt": ["w1"], "chosen": ["w2"], "rejected": ["w3"]})
    with float64():
        trainer = trl.DPOTrainer(folder, args=config, train_dataset=rows)
        policy, trainer.ref_model = (Given(x.reshape(2 * pairs, T)) for x in (logp, reference))
        trainer.model = policy
        ids = torch.ones(2 * pairs, T + 1, dtype=torch.long)
        ids[:, 0] = torch.arange(2 * pairs)
        counted = torch.zeros_like(ids)
        counted[:, 1:] = torch.tensor(mask.reshape(2 * pairs, T))
        inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), completion_mask=counted)
        loss = trainer.compute_loss(policy, inputs)
        loss.backward()
    return loss.item(), policy.logp.grad.numpy().reshape(mask.shape)
