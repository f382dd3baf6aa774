"""The name tables: which published tensor is which leaf of our tree, one table a format, read both ways.

An entry's pattern says how a matrix lies, in the legend's letters (`types.py`): `(N P+V) C -> C N P` is a published
[N · (P + V), C] of which the first P rows of every head are our [C, N, P]. Published matrices are [out, in], ours
[in, out] with heads apart, stacked over layers and experts. Names: README_WEIGHTS.md of DeepSeek-V3 and the modelling
code of the other members.
"""

from typing import NamedTuple

from deepseek_jax.config import GQA, MLA, Dense, ModelConfig, MoE, YarnScaling
from deepseek_jax.interop.rows import Row, make_row

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
"""Format (`model_type` of config.json) -> class that its config.json names."""


class _Entry(NamedTuple):
    path: str
    """Leaf under its layer; `router:` opens one of the router collection."""
    name: str
    """Tensor under its layer; `*` stands for the expert."""
    pattern: str
    fp8: bool = False
    """Whether an FP8 checkpoint quantises it."""


_NORMS = (
    _Entry("attention_norm/scale", "input_layernorm.weight", "D -> D"),
    _Entry("ffn_norm/scale", "post_attention_layernorm.weight", "D -> D"),
)
_GQA = (
    _Entry("attention/w_q", "self_attn.q_proj.weight", "(N H) D -> D N H", True),
    _Entry("attention/w_k", "self_attn.k_proj.weight", "(K H) D -> D K H", True),
    _Entry("attention/w_v", "self_attn.v_proj.weight", "(K H) D -> D K H", True),
    _Entry("attention/w_o", "self_attn.o_proj.weight", "D (N H) -> N H D", True),
)
_QKV_BIAS = (
    _Entry("attention/b_q", "self_attn.q_proj.bias", "(N H) -> N H"),
    _Entry("attention/b_k", "self_attn.k_proj.bias", "(K H) -> K H"),
    _Entry("attention/b_v", "self_attn.v_proj.bias", "(K H) -> K H"),
)
_MLA_QUERY = (_Entry("attention/w_q", "self_attn.q_proj.weight", "(N P+R) D -> D N P+R", True),)
_MLA_LATENT_QUERY = (
    _Entry("attention/w_dq", "self_attn.q_a_proj.weight", "Q D -> D Q", True),
    _Entry("attention/q_norm/scale", "self_attn.q_a_layernorm.weight", "Q -> Q"),
    _Entry("attention/w_uq", "self_attn.q_b_proj.weight", "(N P+R) Q -> Q N P+R", True),
)
_MLA = (
    _Entry("attention/w_dkv", "self_attn.kv_a_proj_with_mqa.weight", "C+R D -> D C", True),
    _Entry("attention/w_kr", "self_attn.kv_a_proj_with_mqa.weight", "C+R D -> D R", True),
    _Entry("attention/kv_norm/scale", "self_attn.kv_a_layernorm.weight", "C -> C"),
    _Entry("attention/w_uk", "self_attn.kv_b_proj.weight", "(N P+V) C -> C N P", True),
    _Entry("attention/w_uv", "self_attn.kv_b_proj.weight", "(N P+V) C -> C N V", True),
    _Entry("attention/w_o", "self_attn.o_proj.weight", "D (N V) -> N V D", True),
)


def _mlp(path: str, name: str, width: str) -> tuple[_Entry, ...]:
    return (
        _Entry(f"{path}/w_gate", f"{name}.gate_proj.weight", f"{width} D -> D {width}", True),
        _Entry(f"{path}/w_up", f"{name}.up_proj.weight", f"{width} D -> D {width}", True),
        _Entry(f"{path}/w_down", f"{name}.down_proj.weight", f"D {width} -> {width} D", True),
    )


_DENSE = _mlp("ffn", "mlp", "F")
_EXPERTS = (_Entry("ffn/router/w", "mlp.gate.weight", "E D -> D E"), *_mlp("ffn/experts", "mlp.experts.*", "Fe"))
_SHARED = _mlp("ffn/shared", "mlp.shared_experts", "Fs")
_BIAS = (_Entry("router:ffn/router/bias", "mlp.gate.e_score_correction_bias", "E -> E"),)
_MTP = (
    _Entry("embedding_norm/scale", "enorm.weight", "D -> D"),
    _Entry("hidden_norm/scale", "hnorm.weight", "D -> D"),
    _Entry("w_proj", "eh_proj.weight", "D DD -> DD D"),  # the embedding half comes first
    _Entry("norm/scale", "shared_head.norm.weight", "D -> D"),
)


def format_of(config: ModelConfig) -> str:
    """The published format that holds this configuration.

    Raises: ValueError that names the field for which there is none.
    """

    def need(condition: bool, field: str, value: object, remedy: str) -> None:
        if not condition:
            raise ValueError(f"{config.name}: {field} = {value!r}: no published format holds this: {remedy}")

    ffn, attention = config.ffn, config.attention
    latent = isinstance(attention, MLA)
    need(config.rope.interleaved == latent, "rope.interleaved", config.rope.interleaved, "MLA has pairs, GQA halves")
    scaling = config.rope.scaling
    if isinstance(scaling, YarnScaling) and (scaling.mscale, scaling.mscale_all_dim) != (1, 0):
        both = scaling.mscale > 0 and scaling.mscale_all_dim > 0
        need(latent and both, "rope.scaling", scaling, "mscale = 1 and mscale_all_dim = 0, or with MLA both above 0")
    if isinstance(attention, GQA):
        need(config.num_nextn_predict_layers == 0, "num_nextn_predict_layers", config.num_nextn_predict_layers, "0")
        if isinstance(ffn, Dense):
            return "qwen2" if attention.qkv_bias else "llama"
        need(not attention.qkv_bias, "attention.qkv_bias", True, "False with experts")
        need(ffn.scoring_func == "softmax", "ffn.scoring_func", ffn.scoring_func, "'softmax' with GQA")
        need(ffn.topk_method == "greedy", "ffn.topk_method", ffn.topk_method, "'greedy' with GQA")
        need(ffn.routed_scaling_factor == 1, "ffn.routed_scaling_factor", ffn.routed_scaling_factor, "1 with GQA")
        width = attention.num_attention_heads * attention.head_dim
        need(width == config.hidden_size, "attention.head_dim", attention.head_dim, "hidden_size / num_attention_heads")
        return "deepseek"
    need(isinstance(ffn, MoE), "ffn", type(ffn).__name__, "a MoE with MLA (first_k_dense_replace may be all layers)")
    assert isinstance(ffn, MoE)
    if ffn.topk_method == "noaux_tc":
        need(ffn.scoring_func == "sigmoid", "ffn.scoring_func", ffn.scoring_func, "'sigmoid' with noaux_tc")
        return "deepseek_v3"
    need(ffn.scoring_func == "softmax", "ffn.scoring_func", ffn.scoring_func, "'softmax' without noaux_tc")
    need(not ffn.norm_topk_prob, "ffn.norm_topk_prob", ffn.norm_topk_prob, "False in deepseek_v2")
    need(config.num_nextn_predict_layers == 0, "num_nextn_predict_layers", config.num_nextn_predict_layers, "0 in V2")
    return "deepseek_v2"


def table(config: ModelConfig) -> list[Row]:
    """Every leaf of `DeepSeek(config)`'s variables with the tensors it is made of; the same list reads and writes.

    Raises: ValueError where no published format holds the configuration.
    """
    format_of(config)
    sizes = _sizes(config)
    rows = [_row(_Entry("embed/embedding", "model.embed_tokens.weight", "W D -> W D"), sizes)]
    dense, layers = config.num_dense_layers, config.num_hidden_layers
    if dense:
        rows += _stack("dense_layers", _layer(config, moe=False), range(dense), sizes)
    if dense < layers:
        rows += _stack("moe_layers", _layer(config, moe=True), range(dense, layers), sizes)
    rows += [_row(_Entry("final_norm/scale", "model.norm.weight", "D -> D"), sizes)]
    if not config.tie_word_embeddings:
        rows += [_row(_Entry("head/w", "lm_head.weight", "W D -> D W"), sizes)]
    modules = range(layers, layers + config.num_nextn_predict_layers)
    if modules:
        block = _layer(config, moe=isinstance(config.ffn, MoE))
        inside = [entry._replace(path=_below("block", entry.path)) for entry in block]
        rows += _stack("mtp", (*_MTP, *inside), modules, sizes)
    return rows


def copies(config: ModelConfig) -> dict[str, str]:
    """Tensor -> the tensor that it repeats: what a checkpoint may hold beside the table's tensors, bit for bit equal.

    A multi-token module carries the main model's embedding and head; a tied model may carry its embedding as head.
    """
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    found = {"lm_head.weight": head} if config.tie_word_embeddings else {}
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        found[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        found[f"model.layers.{layer}.shared_head.head.weight"] = head
    return found


def _layer(config: ModelConfig, moe: bool) -> tuple[_Entry, ...]:
    if isinstance(config.attention, GQA):
        attention = _GQA + (_QKV_BIAS if config.attention.qkv_bias else ())
    else:
        attention = (_MLA_QUERY if config.attention.q_lora_rank is None else _MLA_LATENT_QUERY) + _MLA
    if not moe:
        return _NORMS + attention + _DENSE
    assert isinstance(config.ffn, MoE)
    shared = _SHARED if config.ffn.n_shared_experts else ()
    return _NORMS + attention + _EXPERTS + shared + (_BIAS if config.ffn.topk_method == "noaux_tc" else ())


def _sizes(config: ModelConfig) -> dict[str, int]:
    """The legend's letters; Fe and Fs are the widths of a routed expert and of all shared ones, DD is 2 D."""
    a, ffn = config.attention, config.ffn
    sizes = {"W": config.vocab_size, "D": config.hidden_size, "DD": 2 * config.hidden_size, "N": a.num_attention_heads}
    if isinstance(a, GQA):
        sizes |= {"K": a.num_key_value_heads, "H": a.head_dim}
    else:
        sizes |= {"Q": a.q_lora_rank or 0, "C": a.kv_lora_rank}
        sizes |= {"P": a.qk_nope_head_dim, "R": a.qk_rope_head_dim, "V": a.v_head_dim}
    sizes["F"] = ffn.intermediate_size
    if isinstance(ffn, MoE):
        width = ffn.moe_intermediate_size
        sizes |= {"E": ffn.n_routed_experts, "Fe": width, "Fs": ffn.n_shared_experts * width}
    return sizes


def _below(group: str, path: str) -> str:
    router = path.startswith("router:")
    return f"router:{group}/{path.removeprefix('router:')}" if router else f"{group}/{path}"


def _stack(group: str, entries: tuple[_Entry, ...], layers: range, sizes: dict[str, int]) -> list[Row]:
    return [
        _row(
            entry._replace(path=_below(group, entry.path), name=f"model.layers.{{layer}}.{entry.name}"), sizes,
            tuple(layers), sizes["E"] if "*" in entry.name else None,
        )
        for entry in entries
    ]  # fmt: skip


def _row(
    entry: _Entry, sizes: dict[str, int], layers: tuple[int, ...] | None = None, experts: int | None = None
) -> Row:
    collection = "router" if entry.path.startswith("router:") else "params"
    leaf, tensor = f"{collection}/{entry.path.removeprefix('router:')}", entry.name.replace("*", "{expert}")
    return make_row(leaf, tensor, entry.pattern, sizes, layers, experts, entry.fp8)
