"""How a run begins: from its own last good checkpoint, from another run's weights, or from nothing."""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import jax
from jax.sharding import Mesh

from deepseek_jax import storage
from deepseek_jax.chat.data import ChatData
from deepseek_jax.chat.dataset import Chats, keep_of_chats, load_chats
from deepseek_jax.checkpoint import leaves
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import LAYOUT, ModelConfig
from deepseek_jax.data.dataset import Data, load
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.parallel import hosts
from deepseek_jax.parallel.ring import check_length
from deepseek_jax.parallel.rules import degree
from deepseek_jax.training.config import RunConfig
from deepseek_jax.training.state import TrainState, abstract_state, init_state, new_state

# Fields that decide what a step computes. Others (logging, checkpoints, mesh, accumulation …) may change from start to start.
_PINNED = (
    "model", "schedule", "optimizer", "batch_size", "seq_len", "batch_ramp", "train_tokens", "mtp_loss_weight",
    "bias_update_speed", "lora", "ema_decay", "spike_skip", "seed",
)  # fmt: skip


_SHARED_S = 90.0  # seconds in which a file must be seen everywhere; network file systems keep listings for a minute


def check_pieces(config: RunConfig, mesh: Mesh) -> None:
    """A piece must spread over the devices that share a batch, a sequence over those that share it, and fit its pipeline."""
    check_length(config.seq_len, degree("length", mesh), "RunConfig.seq_len")
    if config.pipeline is not None:
        stages, model = degree("stages", mesh), config.model
        config.pipeline.check_layers(stages, model.num_moe_layers or model.num_dense_layers)
        config.pipeline.check_rows(stages, config.piece_size, degree("batch", mesh) // stages)
    batch_shards = degree("batch", mesh)
    if config.piece_size % batch_shards:
        raise ValueError(
            f"RunConfig.batch_size = {config.batch_size} in {config.accumulation} accumulation steps cannot be split "
            f"over the {batch_shards} devices that share the batch: make batch_size a multiple of "
            f"{config.accumulation * batch_shards}"
        )


def require_shared(run_dir: Any) -> None:
    """Refuse a run folder that is not one and the same for all processes: each writes its shards of a checkpoint there.

    Raises: ValueError; PeerFailed where another process does not see it.
    """
    if jax.process_count() == 1:
        return
    mark, note = hosts.of_first(uuid.uuid4().hex), run_dir / ".hosts.json"
    machines = hosts.gather(socket.gethostname())
    with hosts.together("looking into the run folder"):
        if hosts.leads():
            storage.write_atomic(note, json.dumps({"mark": mark, "hosts": machines}) + "\n")
    with hosts.together("looking into the run folder"):
        deadline = time.monotonic() + _SHARED_S
        while not (note.exists() and json.loads(note.read_text())["mark"] == mark):
            if time.monotonic() > deadline:
                raise ValueError(
                    f"run_dir={str(run_dir)!r}: {socket.gethostname()} does not see what {machines[0]} (process 0) wrote "
                    f"there: give a folder that all hosts share, gs:// or a network file system"
                )
            time.sleep(0.2)


def load_data(config: RunConfig, run_dir: Any, *, progress: bool = True, loaded: Any = None) -> Data | Chats:
    """What the run reads, by the kind of its `data`; `loaded` where that is it, read before by `dsj.sft`.

    Of several processes the first encodes, and the others find it done where they share its cache folder.

    Raises: ValueError as `data.dataset.load` and `chat.dataset.load_chats`.
    """
    data: Any = None
    for turn in (True, False):
        with hosts.together("reading the data"):
            if hosts.leads() == turn:
                data = _load_data(config, run_dir, progress, loaded)
    if len({*(said := hosts.gather(data.fingerprint))}) > 1:
        raise ValueError(
            f"RunConfig.data: the processes read different data (fingerprints {', '.join(said)}): give all one"
        )
    return data


def _load_data(config: RunConfig, run_dir: Any, progress: bool, loaded: Any) -> Data | Chats:
    if loaded is not None and loaded.config == config.data and loaded.train[0]["tokens"].size == config.seq_len + 1:
        keep_of_chats(loaded.tokenizer, run_dir, loaded.config)
        return loaded
    options: Any = {"model_vocab_size": config.model.vocab_size, "progress": progress}
    if isinstance(config.data, ChatData):
        return load_chats(config.data, config.seq_len, run_dir, **options)
    return load(config.data, config.seq_len, run_dir, **options)


def resume(
    config: RunConfig,
    template: TrainState,
    store: Store,
    batches: Any,
    pinned: dict[str, Any],
    say: Callable[[str], None],
) -> tuple[TrainState, int, dict[str, Any]] | None:
    """State, step and note of the last good checkpoint; None where there is none yet.

    Later steps, which did not verify, are deleted: the run is going to write them again.

    Raises: ValueError where the checkpoint was made by another configuration or from other data.
    """
    step = store.latest_good(config.verify_checkpoints, say)
    state, meta = None, {}
    if step is not None:
        meta = store.meta(step)
        saved = meta.get("pinned", {})
        if "accumulation" in saved:  # from when it had to stay: the position is in pieces of it
            pinned = pinned | {"accumulation": config.accumulation}
        require_same(saved, pinned)
        if meta.get("horizon", config.horizon) != config.horizon:
            say(
                f"the schedule was laid out for {meta['horizon']:,} tokens, and is for {config.horizon:,} now: the rates "
                f"of this run are those of neither. A run that may grow names its train_tokens from the start"
            )
        state, meta = store.restore(template, batches, step)
    discard_after(store, step, say)
    return None if state is None or step is None else (state, step, meta)


def discard_after(store: Store, step: int | None, say: Callable[[str], None]) -> None:
    """Deletes the checkpoints behind `step` (None: all), which did not verify and are going to be written again."""
    for later in hosts.of_first(store.steps()):  # one process may see a deletion before another has listed
        if step is None or later > step:
            say(f"checkpoint {store.directory / str(later)} is deleted, to be written again")
            store.discard(later)


def fresh(config: RunConfig, mesh: Mesh, run_dir: Any, say: Callable[[str], None]) -> TrainState:
    """The state of step 0: drawn from the seed, or with the weights of `config.init_from`."""
    if config.init_from is None:
        return init_state(config, mesh)
    template = abstract_state(config, mesh)
    params, router = _weights_of(config, template, mesh, run_dir, say)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
    return jax.jit(lambda p, r: new_state(config, p, r), out_shardings=shardings)(params, router)


def pinned_fields(config: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    """What a checkpoint's note remembers of `to_dict(config)` and the data, to be compared when the run goes on."""
    return {name: config[name] for name in _PINNED} | {"data_fingerprint": fingerprint}


def require_same(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to continue with another recipe, or on other data. The model's `LAYOUT` may change.

    Raises: ValueError that names each field that differs.
    """
    defaults = {field.name: field.default for field in fields(ModelConfig)}
    if isinstance(model := saved.get("model"), dict):
        # What this version has and that one had not, it did as the defaults say.
        missing = {name: defaults[name] for name in now["model"] if name not in model and name in defaults}
        now = now | {"model": now["model"] | dict.fromkeys(LAYOUT)}
        saved = saved | {"model": missing | model | dict.fromkeys(LAYOUT)}
    changes = list(_changes(saved, now, ""))
    if changes:
        raise ValueError(
            "this run folder's checkpoint was made with another configuration:\n  "
            + "\n  ".join(changes)
            + "\nundo that, or start a new run folder (init_from takes the weights along). data_fingerprint stands for "
            "corpus, tokenizer, seq_len, masking and mixture"
        )


def _changes(saved: Any, now: Any, where: str) -> Any:
    if isinstance(saved, dict) and isinstance(now, dict):
        for name in sorted({*saved, *now}):
            yield from _changes(saved.get(name), now.get(name), f"{where}.{name}" if where else name)
    elif saved != now:
        yield f"{where}: {saved!r} in the checkpoint, {now!r} now"


def _weights_of(
    config: RunConfig, template: TrainState, mesh: Mesh, run_dir: Any, say: Callable[[str], None]
) -> tuple[Any, Any]:
    """Parameters and selection biases of the run, or of the published checkpoint, that `init_from` names."""
    source = storage.path(config.init_from or "")
    published = (source / "config.json").exists()
    what = f"RunConfig.init_from = {config.init_from!r}"
    if not published and not (source / "checkpoints").exists():
        raise ValueError(
            f"{what} holds neither checkpoints nor config.json: give a run folder or a published checkpoint"
        )
    if not published or (source / "tokenizer.json").exists():
        ours, theirs = (load_tokenizer(folder / "tokenizer.json").sha256 for folder in (run_dir, source))
        if ours != theirs:
            raise ValueError(
                f"{what} was trained with another tokenizer than data gives now: set data.tokenizer to "
                f"{source / 'tokenizer.json'}"
            )
    wanted = {"params": template.params, **({"router": template.router} if template.router else {})}
    if published:
        from deepseek_jax.interop.load import load_hf

        dtype: Any = config.model.param_dtype
        _, weights = load_hf(source, dtype, mesh, mtp=config.model.num_nextn_predict_layers > 0)
        records = [leaves.record(leaves.flatten(tree)[0]) for tree in (weights, wanted)]
        leaves.require_equal(*records, where=f"{what}: the model in config.json")
        say(f"weights of the published checkpoint {source}")
        return weights["params"], weights.get("router", {})
    saved_as = _param_dtype(source)
    stored = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, saved_as or leaf.dtype, sharding=leaf.sharding), wanted["params"]
    )
    with Store(source / "checkpoints", read_only=True) as store:
        step = store.latest_good(config.verify_checkpoints, say)
        if step is None:
            raise ValueError(f"{what} has no finished checkpoint: give the folder of a run that has one")
        weights, _ = store.restore_params(wanted | {"params": stored}, step)
    say(f"weights of step {step} of {source}")
    params = jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), weights["params"], wanted["params"])
    return params, weights.get("router", {})


def _param_dtype(run_dir: Any) -> Any:
    """What a run keeps its parameters in; None where its manifest does not say."""
    manifest = run_dir / "manifest.json"
    if not manifest.exists():
        return None
    return json.loads(manifest.read_text(encoding="utf-8"))["config"]["model"].get("param_dtype")
