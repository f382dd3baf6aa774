"""Published checkpoints without the library: random configurations, tensors, block-FP8, and the forward pass on them.

Everything here is written down on the published names and [out, in] matrices, in float64, so that neither the library's
tree nor its tables have a part in the truth.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from literal.attention import linear_frequencies, llama3_frequencies, plain_frequencies, yarn_frequencies, yarn_m
from safetensors.numpy import load_file, save_file

ARCHITECTURES = {
    "llama": "Llama", "qwen2": "Qwen2", "deepseek": "Deepseek", "deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3",
}  # fmt: skip
KINDS = tuple(ARCHITECTURES)


def random_config(kind: str, draw: np.random.Generator) -> dict[str, Any]:
    """A config.json of this type, sizes and rules drawn at random."""

    def pick(*values):
        return values[draw.integers(len(values))]

    heads = int(pick(2, 4, 6))
    config: dict[str, Any] = dict(
        architectures=[f"{ARCHITECTURES[kind]}ForCausalLM"], model_type=kind, vocab_size=pick(61, 150),
        hidden_size=heads * pick(10, 36), num_hidden_layers=pick(2, 3), num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=pick(30, 140), hidden_act="silu", max_position_embeddings=256,
        rms_norm_eps=1e-6, initializer_range=0.02, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
        rope_theta=pick(10000.0, 500000.0), rope_scaling=None, torch_dtype="bfloat16",
    )  # fmt: skip
    if kind != "qwen2":
        config["attention_bias"] = False
    if kind in ("llama", "qwen2"):
        config["num_key_value_heads"] = pick(1, heads // 2, heads)
        config["tie_word_embeddings"] = pick(True, False)
    if kind == "llama":
        llama3 = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
        config["rope_scaling"] = pick(None, {"type": "linear", "factor": 4.0}, llama3 | {"rope_type": "llama3"})
    if "deepseek" in kind:
        groups, experts = pick((1, 1), (4, 2)) if kind != "deepseek" else (1, 1), 8
        config |= dict(
            moe_intermediate_size=pick(12, 34), n_routed_experts=experts, n_shared_experts=pick(1, 2),
            num_experts_per_tok=pick(2, 3), first_k_dense_replace=1, moe_layer_freq=1, norm_topk_prob=False,
            scoring_func="softmax", aux_loss_alpha=0.001, seq_aux=True,
        )  # fmt: skip
    if kind in ("deepseek_v2", "deepseek_v3"):
        mscale = pick(0.707, 1.0)
        yarn = dict(
            type="yarn", factor=8, beta_fast=32, beta_slow=1, mscale=mscale, mscale_all_dim=mscale,
            original_max_position_embeddings=32,
        )  # fmt: skip
        config |= dict(
            q_lora_rank=pick(None, 22), kv_lora_rank=pick(18, 132), qk_nope_head_dim=pick(10, 16),
            qk_rope_head_dim=pick(8, 12), v_head_dim=pick(14, 18), n_group=groups[0], topk_group=groups[1],
            topk_method="greedy" if groups[0] == 1 else "group_limited_greedy", routed_scaling_factor=pick(1.0, 2.5),
            rope_scaling=yarn,
        )  # fmt: skip
    if kind == "deepseek_v3":
        config |= dict(
            scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=pick(True, False),
            num_nextn_predict_layers=pick(0, 1, 2),
        )  # fmt: skip
    return config


def tensor_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, copies of the multi-token modules among them."""
    D, N, shapes = c["hidden_size"], c["num_attention_heads"], {}

    def mlp(prefix: str, width: int) -> None:
        shapes.update({f"{prefix}.{n}_proj.weight": (width, D) for n in ("gate", "up")})
        shapes[f"{prefix}.down_proj.weight"] = (D, width)

    def layer(prefix: str, moe: bool) -> None:
        a = f"{prefix}.self_attn"
        shapes.update({f"{prefix}.{n}_layernorm.weight": (D,) for n in ("input", "post_attention")})
        if "kv_lora_rank" in c:
            Q, C, P, R, V = (
                c.get(n) for n in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
            )
            if Q is None:
                shapes[f"{a}.q_proj.weight"] = (N * (P + R), D)
            else:
                shapes[f"{a}.q_a_proj.weight"], shapes[f"{a}.q_a_layernorm.weight"] = (Q, D), (Q,)
                shapes[f"{a}.q_b_proj.weight"] = (N * (P + R), Q)
            shapes[f"{a}.kv_a_proj_with_mqa.weight"], shapes[f"{a}.kv_a_layernorm.weight"] = (C + R, D), (C,)
            shapes[f"{a}.kv_b_proj.weight"], shapes[f"{a}.o_proj.weight"] = (N * (P + V), C), (D, N * V)
        else:
            H = c.get("head_dim") or D // N
            for n, heads in (
                ("q", N),
                ("k", c.get("num_key_value_heads") or N),
                ("v", c.get("num_key_value_heads") or N),
            ):
                shapes[f"{a}.{n}_proj.weight"] = (heads * H, D)
                if c["model_type"] == "qwen2":
                    shapes[f"{a}.{n}_proj.bias"] = (heads * H,)
            shapes[f"{a}.o_proj.weight"] = (D, N * H)
        if not moe:
            return mlp(f"{prefix}.mlp", c["intermediate_size"])
        shapes[f"{prefix}.mlp.gate.weight"] = (c["n_routed_experts"], D)
        if c.get("topk_method") == "noaux_tc":
            shapes[f"{prefix}.mlp.gate.e_score_correction_bias"] = (c["n_routed_experts"],)
        for expert in range(c["n_routed_experts"]):
            mlp(f"{prefix}.mlp.experts.{expert}", c["moe_intermediate_size"])
        if c.get("n_shared_experts"):
            mlp(f"{prefix}.mlp.shared_experts", c["n_shared_experts"] * c["moe_intermediate_size"])

    L, W = c["num_hidden_layers"], c["vocab_size"]
    shapes["model.embed_tokens.weight"] = (W, D)
    for index in range(L):
        layer(f"model.layers.{index}", index >= c.get("first_k_dense_replace", L))
    shapes["model.norm.weight"] = (D,)
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (W, D)
    for index in range(L, L + c.get("num_nextn_predict_layers", 0)):
        m = f"model.layers.{index}"
        shapes |= {f"{m}.embed_tokens.weight": (W, D), f"{m}.eh_proj.weight": (D, 2 * D)}
        shapes |= {f"{m}.{n}.weight": (D,) for n in ("enorm", "hnorm", "shared_head.norm")}
        shapes[f"{m}.shared_head.head.weight"] = (W, D)
        layer(m, moe=True)
    return shapes


def random_tensors(config: dict[str, Any], draw: np.random.Generator) -> dict[str, np.ndarray]:
    """Float32 weights, each a bfloat16 number, under which every part matters: norms off 1, biases set."""
    tensors: dict[str, np.ndarray] = {}
    for name, shape in tensor_shapes(config).items():
        if name.endswith("shared_head.head.weight"):
            value = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
        elif name.endswith("embed_tokens.weight") and name != "model.embed_tokens.weight":
            value = tensors["model.embed_tokens.weight"]
        elif name.endswith("norm.weight"):
            value = draw.uniform(0.5, 1.5, shape)
        elif name.endswith("bias"):
            value = draw.uniform(-0.3, 0.3, shape)
        else:
            value = draw.normal(0, 1.2 / np.sqrt(shape[-1]), shape)
        tensors[name] = value.astype(ml_dtypes.bfloat16).astype(np.float32)
    return tensors


def quantised(
    tensors: dict[str, np.ndarray], power_of_two: bool
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """As V3 publishes: tensors on disk with FP8 blocks and scales, and the float32 weights that they stand for."""
    stored, meant = {}, {}
    for name, w in tensors.items():
        linear = name.endswith(("_proj.weight", "_proj_with_mqa.weight"))
        if not linear or "eh_proj" in name or w.ndim != 2:
            stored[name] = w if name.endswith("correction_bias") else w.astype(ml_dtypes.bfloat16)
            meant[name] = w
            continue
        values, exact = np.zeros(w.shape, ml_dtypes.float8_e4m3fn), np.zeros(w.shape, np.float32)
        scales = np.zeros((-(-w.shape[0] // 128), -(-w.shape[1] // 128)), np.float32)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
                scale = np.float32(max(np.abs(w[block]).max(), 1e-4)) / np.float32(448)
                scales[i, j] = 2.0 ** np.ceil(np.log2(scale)) if power_of_two else scale
                values[block] = (w[block] / scales[i, j]).astype(ml_dtypes.float8_e4m3fn)
                exact[block] = values[block].astype(np.float32) * scales[i, j]
        stored[name], stored[f"{name}_scale_inv"], meant[name] = values, scales, exact
    return stored, meant


def write(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """The folder, with an index where there are several shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map, names = {}, sorted(tensors)
    for k in range(shards):
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[k::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[k::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


FP8 = dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128])


def logits(c: dict[str, Any], tensors: dict[str, np.ndarray], tokens: np.ndarray) -> tuple[np.ndarray, list, float]:
    """Main logits [T, W], multi-token logits of each depth, and how near a choice of experts was to another."""
    w = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    margins, T, N = [1.0], len(tokens), c["num_attention_heads"]
    s = dict(c["rope_scaling"] or {})
    kind = s.pop("type", None) or s.pop("rope_type", None)
    s.pop("rope_type", None)
    stretch = 1.0
    if kind == "yarn":
        s = {"beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0} | s
        stretch = yarn_m(s["factor"], s["mscale"]) / yarn_m(s["factor"], s["mscale_all_dim"])

    def angles(dim):
        theta = c["rope_theta"]
        if kind == "linear":
            return linear_frequencies(dim, theta, s["factor"])
        if kind == "llama3":
            original = s["original_max_position_embeddings"]
            return llama3_frequencies(
                dim, theta, s["factor"], s["low_freq_factor"], s["high_freq_factor"], original
            )  # fmt: skip
        if kind == "yarn":
            original = s["original_max_position_embeddings"]
            return yarn_frequencies(dim, theta, s["factor"], original, s["beta_fast"], s["beta_slow"])
        return plain_frequencies(dim, theta)

    def norm(x, name, eps=c["rms_norm_eps"]):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w[name]

    def rotate(x, interleaved):  # [heads, T, R]
        turn = stretch * np.exp(1j * np.outer(np.arange(x.shape[1]), angles(x.shape[-1])))
        half = x.shape[-1] // 2
        z = x[..., 0::2] + 1j * x[..., 1::2] if interleaved else x[..., :half] + 1j * x[..., half:]
        z = z * turn
        return np.stack([z.real, z.imag], -1).reshape(x.shape) if interleaved else np.concatenate([z.real, z.imag], -1)

    def heads(x, count):
        return x.reshape(len(x), count, -1).transpose(1, 0, 2)

    def attention(p, x):
        if "kv_lora_rank" in c:
            C, P = c["kv_lora_rank"], c["qk_nope_head_dim"]
            if c["q_lora_rank"] is None:
                q = x @ w[f"{p}.q_proj.weight"].T
            else:
                q = (
                    norm(x @ w[f"{p}.q_a_proj.weight"].T, f"{p}.q_a_layernorm.weight", 1e-6)
                    @ w[f"{p}.q_b_proj.weight"].T
                )
            q, down = heads(q, N), x @ w[f"{p}.kv_a_proj_with_mqa.weight"].T
            kv = heads(norm(down[:, :C], f"{p}.kv_a_layernorm.weight", 1e-6) @ w[f"{p}.kv_b_proj.weight"].T, N)
            rope_k = np.repeat(rotate(down[None, :, C:], True), N, 0)
            q = np.concatenate([q[..., :P], rotate(q[..., P:], True)], -1)
            k, v = np.concatenate([kv[..., :P], rope_k], -1), kv[..., P:]
            scale = q.shape[-1] ** -0.5 * (yarn_m(s["factor"], s["mscale_all_dim"]) ** 2 if kind == "yarn" else 1)
        else:
            K = c["num_key_value_heads"]
            q, k, v = (
                heads(x @ w[f"{p}.{n}_proj.weight"].T + w.get(f"{p}.{n}_proj.bias", 0), count)
                for n, count in (("q", N), ("k", K), ("v", K))
            )
            k, v = (np.repeat(z, N // K, 0) for z in (rotate(k, False), v))
            q, scale = rotate(q, False), q.shape[-1] ** -0.5
        scores = np.where(np.tri(len(x), dtype=bool), q @ k.transpose(0, 2, 1) * scale, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = (weights / weights.sum(-1, keepdims=True)) @ v
        return out.transpose(1, 0, 2).reshape(len(x), -1) @ w[f"{p}.o_proj.weight"].T

    def mlp(p, x):
        gate = x @ w[f"{p}.gate_proj.weight"].T
        return gate / (1 + np.exp(-gate)) * (x @ w[f"{p}.up_proj.weight"].T) @ w[f"{p}.down_proj.weight"].T

    def best(scores, count):
        order = np.argsort(-scores, kind="stable")
        if count < len(scores):
            margins.append(scores[order[count - 1]] - scores[order[count]])
        return order[:count]

    def moe(p, x):
        out = mlp(f"{p}.shared_experts", x) if c.get("n_shared_experts") else np.zeros_like(x)
        scores = x @ w[f"{p}.gate.weight"].T
        if c["scoring_func"] == "sigmoid":
            scores = 1 / (1 + np.exp(-scores))
        else:
            scores = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        for t in range(len(x)):
            choice = scores[t] + w.get(f"{p}.gate.e_score_correction_bias", 0)
            if (groups := c.get("n_group") or 1) > 1 and c["topk_method"] != "greedy":
                grouped = np.sort(choice.reshape(groups, -1), -1)
                value = grouped[:, -2:].sum(-1) if c["topk_method"] == "noaux_tc" else grouped[:, -1]
                kept = np.repeat(np.isin(np.arange(groups), best(value, c["topk_group"])), len(choice) // groups)
                choice = np.where(kept, choice, -9.0)
            chosen = best(choice, c["num_experts_per_tok"])
            weights = scores[t][chosen]
            weights = weights / weights.sum() if c["norm_topk_prob"] else weights
            for e, weight in zip(chosen, weights * c.get("routed_scaling_factor", 1.0), strict=True):
                out[t] += weight * mlp(f"{p}.experts.{e}", x[t : t + 1])[0]
        return out

    def layer(p, x):
        x = x + attention(f"{p}.self_attn", norm(x, f"{p}.input_layernorm.weight"))
        normed = norm(x, f"{p}.post_attention_layernorm.weight")
        return x + (moe if f"{p}.mlp.gate.weight" in w else mlp)(f"{p}.mlp", normed)

    x = w["model.embed_tokens.weight"][tokens]
    for index in range(c["num_hidden_layers"]):
        x = layer(f"model.layers.{index}", x)
    x = norm(x, "model.norm.weight")
    head = w["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
    main, extra = x @ head.T, []
    for k in range(c.get("num_nextn_predict_layers", 0)):
        p = f"model.layers.{c['num_hidden_layers'] + k}"
        following = w[f"{p}.embed_tokens.weight"][tokens[k + 1 :]]
        both = [norm(following, f"{p}.enorm.weight"), norm(x[: T - k - 1], f"{p}.hnorm.weight")]
        x = layer(p, np.concatenate(both, -1) @ w[f"{p}.eh_proj.weight"].T)
        x = norm(x, f"{p}.shared_head.norm.weight")
        extra.append(x @ w[f"{p}.shared_head.head.weight"].T)
    return main, extra, float(min(margins))
