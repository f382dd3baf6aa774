"""What a call of `train` leaves: figures, pictures, samples."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from deepseek_jax import storage
from deepseek_jax.metrics.plots import loss_curve, router_heatmap
from deepseek_jax.parallel import hosts
from deepseek_jax.training.config import RunConfig
from deepseek_jax.training.state import TrainState


@dataclass(frozen=True)
class Run:
    """A finished call of `train`. Of several processes the first has metrics, plots and samples, the others none."""

    run_dir: Any
    config: RunConfig
    state: TrainState
    metrics: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    plots: list[Any]
    checkpoint: Any
    report: Any
    """The page that `deepseek-jax report` makes."""
    samples: list[tuple[str, str]]
    """Prompt and continuation."""

    def summary(self) -> str:
        """What the run came to, for a person to read: held-out figures, samples, where things lie."""
        lines = []
        evaluated = [line for line in self.metrics if "held_out_bits_per_byte" in line]
        if evaluated:
            before, after = (line["held_out_bits_per_byte"] for line in (evaluated[0], evaluated[-1]))
            lines.append(
                f"held-out bits per byte: {before:.3f} before, {after:.3f} after {evaluated[-1]['step']} steps"
            )
        if skipped := max((line.get("skipped", 0) for line in self.metrics), default=0):
            lines.append(f"updates left out, not finite or spikes: {skipped}")
        for prompt, text in self.samples:
            lines += ["", f"--- {prompt!r} goes on:", prompt + text]
        lines += ["", *(f"plot        {path}" for path in self.plots)]
        lines += [f"checkpoint  {self.checkpoint}", f"report      {self.report}"]
        return "\n".join(lines)


def draw(metrics: list[dict[str, Any]], folder: Any, first_moe_layer: int) -> list[Any]:
    """The pictures of a run: the loss, and the routers' load where there are routers."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any("loss" in line for line in metrics):
        return []
    plots = [loss_curve(metrics, folder / "loss.png")]
    if any(line.get("router") for line in metrics):
        plots.append(router_heatmap(metrics, folder / "router.png", first_layer=first_moe_layer))
    return plots


def check_prompts(config: RunConfig, tokenizer: Any) -> None:
    """Refuse, before the first step, a sample that will not fit behind the last."""
    room = config.model.max_position_embeddings - config.sample_tokens - 1
    for prompt in config.sample_prompts:
        if len(tokenizer.encode(prompt)) > room:
            raise ValueError(
                f"RunConfig.sample_prompts: {prompt!r} and sample_tokens = {config.sample_tokens} are more than the "
                f"model's max_position_embeddings = {config.model.max_position_embeddings}: shorten one of them"
            )


def draw_samples(
    config: RunConfig, state: TrainState, tokenizer: Any, step: int, run_dir: Any, say: Callable[[str], None]
) -> list[tuple[str, str]]:
    """Continuations of `config.sample_prompts` by the model as it stands; kept in samples.jsonl.

    They are drawn on one device, of process 0; where the weights do not fit it, none are, and `say` tells.
    """
    if not config.sample_prompts:
        return []
    from deepseek_jax.infer.generate import continue_text
    from deepseek_jax.infer.load import Loaded
    from deepseek_jax.models.transformer import DeepSeek

    variables = {"params": state.params, **({"router": state.router} if state.router else {})}
    if len(jax.devices()) > 1:  # a few prompts cannot be split over a mesh
        if reason := hosts.of_first(_no_room(variables)):
            say(f"RunConfig.sample_prompts: {reason}; `deepseek-jax generate {run_dir}` draws them")
            return []
        variables = hosts.on_first(variables)
    if variables is None:
        return []
    run = Loaded(DeepSeek(config.model), variables, tokenizer)
    texts = continue_text(
        run, config.sample_prompts, max_new_tokens=config.sample_tokens, temperature=0.8, top_p=0.95, seed=config.seed
    )
    samples = list(zip(config.sample_prompts, texts, strict=True))
    lines = [json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n" for prompt, text in samples]
    storage.write_atomic(run_dir / "samples.jsonl", "".join(lines))
    return samples


def _no_room(variables: Any) -> str:
    """Why one device cannot sample from these arrays, or "": it holds them once, and once more taken apart by layer."""
    needed = 2.2 * sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    else:  # the CPU's is the machine's
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if needed <= free:
        return ""
    return f"the weights want {needed / 2**30:.1f} GiB of one device, which has {free / 2**30:.1f} free: no samples"
