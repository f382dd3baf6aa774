"""The training loop, flat enough to read: prepare, restore, step, log, evaluate, save, draw."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_jax.checkpoint.store import Store
from deepseek_jax.data.dataset import load
from deepseek_jax.metrics.manifest import write_manifest
from deepseek_jax.metrics.plots import loss_curve, router_heatmap
from deepseek_jax.metrics.progress import Progress
from deepseek_jax.metrics.writer import JsonlWriter, read_jsonl
from deepseek_jax.parallel.mesh import make_mesh, use_mesh
from deepseek_jax.serialize import check_types, to_dict
from deepseek_jax.training.config import RunConfig
from deepseek_jax.training.devices import fit_dtype
from deepseek_jax.training.evaluate import make_evaluation
from deepseek_jax.training.state import TrainState, abstract_state, init_state
from deepseek_jax.training.step import compile_train_step, place_batch


@dataclass(frozen=True)
class Run:
    """A finished call of `train`."""

    run_dir: Path
    config: RunConfig
    state: TrainState
    metrics: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    plots: list[Path]
    checkpoint: Path
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
        for prompt, text in self.samples:
            lines += ["", f"--- {prompt!r} goes on:", prompt + text]
        lines += ["", *(f"plot        {path}" for path in self.plots), f"checkpoint  {self.checkpoint}"]
        return "\n".join(lines)


def train(config: RunConfig, run_dir: str | Path, *, progress: bool = True) -> Run:
    """Train, or continue the run in `run_dir` from its last checkpoint.

    The folder holds manifest.json, tokenizer.json, metrics.jsonl (a line a logged step), checkpoints/ and plots/.

    Raises:
        ValueError: a field of the wrong type or value, a mesh that does not fit the devices, data that does not fit
            the model, or a checkpoint that does not fit the configuration. All before the first step.
    """
    check_types(config)
    run_dir = Path(run_dir)
    model, message = fit_dtype(config.model)
    config = replace(config, model=model)
    mesh = make_mesh(config.mesh)
    batch_shards = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]
    if config.batch_size // config.accumulation % batch_shards:
        raise ValueError(
            f"RunConfig.batch_size = {config.batch_size} in {config.accumulation} accumulation steps cannot be split "
            f"over the {batch_shards} devices that share the batch: make batch_size a multiple of "
            f"{config.accumulation * batch_shards}"
        )
    reporter = Progress(config.steps, shown=progress)
    if message:
        reporter.message(message)
    template = abstract_state(config, mesh)  # checks that the mesh divides every parameter, before anything long
    data = load(config.data, config.seq_len, run_dir, model_vocab_size=config.model.vocab_size, progress=progress)
    batches = data.train_batches(config.batch_size, config.seed)
    tokens_per_step = config.batch_size * config.seq_len
    order = {"data_fingerprint": data.fingerprint, "batch_size": config.batch_size, "seed": config.seed}
    _check_prompts(config, data.tokenizer)

    with use_mesh(mesh), Store(run_dir / "checkpoints", keep=config.keep_checkpoints) as store:
        first = store.latest()
        if first is None:
            state = init_state(config, mesh)
        else:
            state, meta = store.restore(template, batches, first)
            _same_order(meta, order)
        step = first or 0
        write_manifest(
            run_dir, to_dict(config),
            {"seeds": {"run": config.seed}, "mesh": dict(mesh.shape), "data": data.summary(), "from_step": step},
        )  # fmt: skip
        evaluate = make_evaluation(config, mesh, data)
        train_step = compile_train_step(config, mesh)
        with (
            JsonlWriter(run_dir / "metrics.jsonl", resume_step=first) as log,
            Progress(config.steps, step, shown=progress) as bar,
        ):
            if first is None:
                log.write({"step": 0, "tokens": 0, **evaluate(state)})
            elif step < config.steps:
                bar.message(f"continuing {run_dir} from step {step}")
            since, since_step = time.perf_counter(), step
            while step < config.steps:
                state, metrics = train_step(state, place_batch(next(batches), mesh))
                step += 1
                last = step == config.steps
                evaluated = last or (config.eval_every and step % config.eval_every == 0)
                if step % config.log_every == 0 or evaluated:
                    line = _line(metrics)  # waits for the device
                    now = time.perf_counter()
                    line["tokens_per_second"] = (step - since_step) * tokens_per_step / (now - since)
                    line = {"step": step, "tokens": step * tokens_per_step, **line}
                    if evaluated:
                        line |= evaluate(state)
                    log.write(line)
                    bar.update(step, {"loss": line["loss"], "tok/s": line["tokens_per_second"]})
                    since, since_step = time.perf_counter(), step
                if step % config.checkpoint_every == 0 or last:
                    store.save(step, state, batches, order | {"tokens": step * tokens_per_step})
        store.wait()

    metrics = read_jsonl(run_dir / "metrics.jsonl")
    return Run(
        run_dir=run_dir,
        config=config,
        state=state,
        metrics=metrics,
        plots=_plots(metrics, run_dir / "plots", config.model.num_dense_layers),
        checkpoint=run_dir / "checkpoints" / str(step),
        samples=_samples(config, state, data.tokenizer),
    )


def _line(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics of a step as numbers and lists; the multi-token loss is the mean over depths."""
    line = jax.tree.map(np.asarray, metrics)
    depths = line.pop("loss_mtp")
    if depths.size:
        line["loss_mtp"] = depths.mean()
        if depths.size > 1:
            line["loss_mtp_by_depth"] = depths
    return {name: value.item() if getattr(value, "ndim", None) == 0 else value for name, value in line.items()}


def _same_order(meta: dict[str, Any], order: dict[str, Any]) -> None:
    """Refuse to continue on other data, or on the same in another order."""
    for name, value in order.items():
        if meta.get(name) != value:
            raise ValueError(
                f"the checkpoint was made with {name} = {meta.get(name)!r}, the configuration now gives {value!r} "
                f"(data_fingerprint: corpus, tokenizer, seq_len or masking): undo that, or start a new run folder"
            )


def _check_prompts(config: RunConfig, tokenizer: Any) -> None:
    """Refuse, before the first step, a sample that will not fit behind the last."""
    room = config.model.max_position_embeddings - config.sample_tokens - 1
    for prompt in config.sample_prompts:
        if len(tokenizer.encode(prompt)) > room:
            raise ValueError(
                f"RunConfig.sample_prompts: {prompt!r} and sample_tokens = {config.sample_tokens} are more than the "
                f"model's max_position_embeddings = {config.model.max_position_embeddings}: shorten one of them"
            )


def _plots(metrics: list[dict[str, Any]], folder: Path, first_moe_layer: int) -> list[Path]:
    """The pictures of a run: the loss, and the routers' load where there are routers."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any("loss" in line for line in metrics):
        return []
    plots = [loss_curve(metrics, folder / "loss.png")]
    if any(line.get("router") for line in metrics):
        plots.append(router_heatmap(metrics, folder / "router.png", first_layer=first_moe_layer))
    return plots


def _samples(config: RunConfig, state: TrainState, tokenizer: Any) -> list[tuple[str, str]]:
    """Continuations of `config.sample_prompts` by the model as it stands."""
    if not config.sample_prompts:
        return []
    from deepseek_jax.infer.generate import LoadedRun, continue_text
    from deepseek_jax.models.transformer import DeepSeek

    variables = {"params": state.params, **({"router": state.router} if state.router else {})}
    if len(jax.devices()) > 1:  # three prompts cannot be split over a mesh
        variables = jax.device_put(variables, jax.local_devices()[0])
    run = LoadedRun(DeepSeek(config.model), variables, tokenizer, config.steps)
    texts = continue_text(
        run, config.sample_prompts, max_new_tokens=config.sample_tokens, temperature=0.8, top_p=0.95, seed=config.seed
    )
    return list(zip(config.sample_prompts, texts, strict=True))
