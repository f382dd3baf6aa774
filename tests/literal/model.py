"""A whole model from the library's parameter tree: blocks, multi-token modules, head."""

from dataclasses import dataclass, field

import numpy as np

from .attention import gqa, mla, rms_norm
from .balance import load, sequence_losses
from .experts import Choice, moe, swiglu


@dataclass
class LayerRecord:
    """What the router of one layer did, by sequence."""

    choices: list[list[Choice]] = field(default_factory=list)
    load: np.ndarray | None = None
    losses: list[dict[str, float]] = field(default_factory=list)
    sequences: int = 0
    """Those that hold a counted token."""
    dropped: int = 0


@dataclass
class Result:
    logits: np.ndarray
    """[B, T, W]."""
    mtp_logits: np.ndarray
    """[depth, B, T, W]; NaN where the position has no input token in its document."""
    hidden: np.ndarray
    """[B, T, D] after the final norm."""
    router: dict[str, list[LayerRecord]]
    """moe_layers and mtp."""


def layer_of(tree, index):
    """One layer of a stacked tree."""
    if isinstance(tree, dict):
        return {name: layer_of(value, index) for name, value in tree.items()}
    return tree[index]


def to_float64(tree):
    if isinstance(tree, dict):
        return {name: to_float64(value) for name, value in tree.items()}
    return np.asarray(tree, np.float64)


def block(p, bias, x, positions, segments, counted, config, is_moe, dropping, record):
    """h = x + attention(norm(x)); out = h + ffn(norm(h)), for one sequence."""
    eps = config.rms_norm_eps
    normed = np.array([rms_norm(x_t, p["attention_norm"]["scale"], eps) for x_t in x])
    if hasattr(config.attention, "kv_lora_rank"):
        attended = mla(p["attention"], normed, positions, segments, config.attention, config.rope, eps)
    else:
        attended = gqa(p["attention"], normed, positions, segments, config.attention, config.rope)
    h = x + attended
    normed = np.array([rms_norm(h_t, p["ffn_norm"]["scale"], eps) for h_t in h])
    if not is_moe:
        return h + np.array([swiglu(p["ffn"], x_t) for x_t in normed])
    out, choices, kept = moe(p["ffn"], bias, normed, counted, config.ffn, dropping)
    loads = np.array(load(choices, counted, config.ffn.n_routed_experts), np.float64)
    record.choices.append(choices)
    record.load = loads if record.load is None else record.load + loads
    record.losses.append(sequence_losses(choices, counted, config.ffn))
    record.sequences += any(counted)
    if kept is not None:
        record.dropped += int(loads.sum()) - len(kept)
    return h + out


def run(config, variables, tokens, positions=None, segment_ids=None, exempt=None):
    """The forward pass.

    Args:
        config: attributes as in the library's ModelConfig.
        variables: {"params": …, "router": …}, nested dicts of arrays.
        tokens: int [B, T].
        positions: int [B, T]; None: 0, 1, 2, …
        segment_ids: int [B, T], 0 for padding; None: one document a row.
        exempt: None for evaluation, where no token is dropped; else one bool a sequence, of training: True keeps all.
    """
    params, router = to_float64(variables["params"]), to_float64(variables.get("router", {}))
    tokens = np.asarray(tokens)
    B, T = tokens.shape
    positions = np.tile(np.arange(T), (B, 1)) if positions is None else np.asarray(positions)
    segments = np.ones((B, T), int) if segment_ids is None else np.asarray(segment_ids)
    is_moe = hasattr(config.ffn, "n_routed_experts")
    dense_layers = config.ffn.first_k_dense_replace if is_moe else config.num_hidden_layers
    depth = config.num_nextn_predict_layers
    embedding = params["embed"]["embedding"]
    head = embedding.T if config.tie_word_embeddings else params["head"]["w"]
    eps = config.rms_norm_eps
    records = {"moe_layers": [LayerRecord() for _ in range(config.num_hidden_layers - dense_layers)]} if is_moe else {}
    if is_moe and depth:
        records["mtp"] = [LayerRecord() for _ in range(depth)]

    def bias_of(*path):
        leaf = router
        for name in path:
            leaf = leaf.get(name, {}) if isinstance(leaf, dict) else leaf
        return leaf if isinstance(leaf, np.ndarray) else None

    main_bias = bias_of("moe_layers", "ffn", "router", "bias")
    mtp_bias = bias_of("mtp", "block", "ffn", "router", "bias")
    W, D = embedding.shape
    logits = np.zeros((B, T, W))
    hidden = np.zeros((B, T, D))
    mtp_logits = np.full((depth, B, T, W), np.nan)
    for b in range(B):
        dropping = exempt is not None and not exempt[b]
        counted = [segment != 0 for segment in segments[b]]
        x = np.array([embedding[token] for token in tokens[b]])
        for index in range(dense_layers):
            p = layer_of(params["dense_layers"], index)
            x = block(p, None, x, positions[b], segments[b], counted, config, False, False, None)
        for index in range(config.num_hidden_layers - dense_layers):
            p = layer_of(params["moe_layers"], index)
            bias = None if main_bias is None else main_bias[index]
            record = records["moe_layers"][index]
            x = block(p, bias, x, positions[b], segments[b], counted, config, True, dropping, record)
        hidden[b] = np.array([rms_norm(x_t, params["final_norm"]["scale"], eps) for x_t in x])
        for t in range(T):
            logits[b, t] = hidden[b, t] @ head
        previous = hidden[b]
        for k in range(1, depth + 1):
            p = layer_of(params["mtp"], k - 1)
            bias = None if mtp_bias is None else mtp_bias[k - 1]
            record = records["mtp"][k - 1] if is_moe else None
            previous, valid = mtp_module(
                p, bias, previous, k, tokens[b], embedding, positions[b], segments[b], config, is_moe, dropping, record
            )
            for t in range(T):
                if valid[t]:
                    mtp_logits[k - 1, b, t] = previous[t] @ head
    return Result(logits, mtp_logits, hidden, records)


def mtp_module(p, bias, previous, k, tokens, embedding, positions, segments, config, is_moe, dropping, record):
    """V3 eq. 21–23, depth k, one sequence: h'_i = M [norm(Emb(t_{i+k})) ; norm(h_i)], a block, a norm.

    Readings. The published weights put the embedding half first, the paper the hidden half. The hidden state of depth
    0 is the main model's after its final norm; what is chained is the state after this module's norm, which is also
    what the shared head reads. A position counts when t_{i+k} exists in the same document; documents are contiguous.
    Such a position sees only positions that count, since they are not later than it and in its document.
    """
    T, eps = len(tokens), config.rms_norm_eps
    valid = [i + k < T and segments[i] != 0 and segments[i + k] == segments[i] for i in range(T)]
    x = np.zeros((T, config.hidden_size))
    for i in range(T):
        if valid[i]:
            normed_embedding = rms_norm(embedding[tokens[i + k]], p["embedding_norm"]["scale"], eps)
            normed_hidden = rms_norm(previous[i], p["hidden_norm"]["scale"], eps)
            x[i] = np.concatenate([normed_embedding, normed_hidden]) @ p["w_proj"]
    inside = [segment if counts else 0 for segment, counts in zip(segments, valid, strict=True)]
    x = block(p["block"], bias, x, positions, inside, valid, config, is_moe, dropping, record)
    return np.array([rms_norm(x_t, p["norm"]["scale"], eps) for x_t in x]), valid
