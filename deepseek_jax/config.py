"""What a member of the family is: frozen, keyword-only dataclasses by composition.

Field names are those of DeepSeek's own config.json. Attention is `GQA | MLA`, the feed-forward `Dense | MoE`, rope
scaling one of three kinds or none: what a model has is said by the kind of its parts, not by switches.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args


def require(condition: bool, owner: str, field: str, value: Any, remedy: str) -> None:
    """Raise `ValueError` naming the field, its value and what would be right, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{owner}.{field} = {value!r}: {remedy}")


def _positive(config: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        require(value is not None and value > 0, type(config).__name__, field, value, "must be greater than 0")


def _not_negative(config: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        require(value >= 0, type(config).__name__, field, value, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor` (DeepSeek Coder)."""

    factor: float

    def __post_init__(self) -> None:
        _positive(self, "factor")


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's frequency bands (R1-Distill-Llama): low frequencies divided by `factor`, a smooth band between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        _positive(self, "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        require(
            self.high_freq_factor > self.low_freq_factor,
            "Llama3Scaling", "high_freq_factor", self.high_freq_factor,
            f"must be greater than low_freq_factor = {self.low_freq_factor}",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071) as V2 and V3 use it: per-frequency interpolation and a softmax temperature."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
        _not_negative(self, "mscale", "mscale_all_dim")
        require(self.factor >= 1, "YarnScaling", "factor", self.factor, "must be at least 1")
        require(
            self.beta_fast > self.beta_slow, "YarnScaling", "beta_fast", self.beta_fast,
            f"must be greater than beta_slow = {self.beta_slow}",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding: base, layout of the pairs, scaling."""

    theta: float = 10000.0
    interleaved: bool = False
    """True: pairs (0,1), (2,3), … as in MLA's weights; False: pairs (i, i + half) as in Llama's."""
    scaling: None | LinearScaling | Llama3Scaling | YarnScaling = None

    def __post_init__(self) -> None:
        _positive(self, "theta")


@dataclass(frozen=True, kw_only=True)
class GQA:
    """Grouped-query attention; multi-head attention where both head counts are equal."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        _positive(self, "num_attention_heads", "num_key_value_heads", "head_dim")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "GQA", "num_key_value_heads", self.num_key_value_heads,
            f"must divide num_attention_heads = {self.num_attention_heads}",
        )  # fmt: skip
        require(self.head_dim % 2 == 0, "GQA", "head_dim", self.head_dim, "must be even, rope rotates pairs")


@dataclass(frozen=True, kw_only=True)
class MLA:
    """Multi-head latent attention (V2, section 2.1)."""

    num_attention_heads: int
    q_lora_rank: int | None
    """Rank of the query latent; None: queries come straight from the hidden state (V2-Lite)."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        _positive(self, "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if self.q_lora_rank is not None:
            require(
                self.q_lora_rank > 0, "MLA", "q_lora_rank", self.q_lora_rank,
                "must be greater than 0, or None for no query compression",
            )  # fmt: skip
        require(
            self.qk_rope_head_dim % 2 == 0, "MLA", "qk_rope_head_dim", self.qk_rope_head_dim,
            "must be even, rope rotates pairs",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Dense:
    """SwiGLU feed-forward in every layer."""

    intermediate_size: int

    def __post_init__(self) -> None:
        _positive(self, "intermediate_size")


@dataclass(frozen=True, kw_only=True)
class MoE:
    """Fine-grained experts with shared experts (DeepSeekMoE), after `first_k_dense_replace` dense layers."""

    intermediate_size: int
    """Width of the leading dense layers; unused (and 0) where there are none."""
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    scoring_func: Literal["softmax", "sigmoid"]
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"]
    """`noaux_tc` is V3's: a bias, in the `router` collection, is added for the selection alone."""
    n_group: int = 1
    """Groups of experts; also the devices of V2's device loss, communication loss and capacity."""
    topk_group: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    expert_loss_alpha: float = 0.0
    """DeepSeekMoE's and V2's expert-level balance factor (alpha_1)."""
    device_loss_alpha: float = 0.0
    """V2's device-level balance factor (alpha_2)."""
    communication_loss_alpha: float = 0.0
    """V2's communication balance factor (alpha_3)."""
    sequence_loss_alpha: float = 0.0
    """V3's complementary sequence-wise balance factor."""
    capacity_factor: float | None = None
    """V2's token dropping in training: budget of a group over its even share; None drops nothing."""
    capacity_exempt_share: float = 0.1
    """Share of the sequences of which no token is dropped."""

    def __post_init__(self) -> None:
        _positive(self, "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")
        _not_negative(
            self, "intermediate_size", "n_shared_experts", "first_k_dense_replace", "expert_loss_alpha",
            "device_loss_alpha", "communication_loss_alpha", "sequence_loss_alpha",
        )  # fmt: skip
        _positive(self, "routed_scaling_factor")

        def check(condition: bool, field: str, remedy: str) -> None:
            require(condition, "MoE", field, getattr(self, field), remedy)

        check(self.scoring_func in ("softmax", "sigmoid"), "scoring_func", "must be 'softmax' or 'sigmoid'")
        check(
            self.topk_method in ("greedy", "group_limited_greedy", "noaux_tc"), "topk_method",
            "must be 'greedy', 'group_limited_greedy' or 'noaux_tc'",
        )  # fmt: skip
        check(
            self.n_routed_experts % self.n_group == 0, "n_group",
            f"must divide n_routed_experts = {self.n_routed_experts}",
        )  # fmt: skip
        check(self.topk_group <= self.n_group, "topk_group", f"must not exceed n_group = {self.n_group}")
        reachable = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.topk_method == "greedy":
            check(self.topk_group == self.n_group, "topk_group", f"greedy selection uses every group: {self.n_group}")
        check(
            self.num_experts_per_tok <= reachable, "num_experts_per_tok",
            f"must not exceed the {reachable} experts in topk_group = {self.topk_group} groups",
        )  # fmt: skip
        if self.topk_method == "noaux_tc" and self.n_group > 1:
            check(
                self.n_routed_experts // self.n_group >= 2, "n_group",
                "V3's group score is the sum of the two best experts: a group needs at least 2 experts",
            )  # fmt: skip
        check(
            self.first_k_dense_replace == 0 or self.intermediate_size > 0, "intermediate_size",
            f"must be the width of the {self.first_k_dense_replace} leading dense layers",
        )  # fmt: skip
        if self.capacity_factor is not None:
            _positive(self, "capacity_factor")
        check(0 <= self.capacity_exempt_share <= 1, "capacity_exempt_share", "must lie between 0 and 1")


Dtype = Literal["float64", "float32", "bfloat16", "float16"]
Remat = Literal["none", "v3", "full", "offload"]
REMATS: tuple[Remat, ...] = get_args(Remat)
"""From the most memory to the least."""
LAYOUT = (
    "remat", "scan_layers", "expert_exchange", "expert_across_slices", "expert_gather_parts", "expert_buffer_factor",
)  # fmt: skip
"""Fields of a ModelConfig for the machine at hand: a run may go on with others. They change no number but by rounding, and by
the pairs that a bounded buffer leaves out, which are counted."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One member of the family. Unless stated: pre-norm RMSNorm, SwiGLU, no biases, untied embeddings."""

    name: str
    vocab_size: int
    """Rows of the embedding, padding rows included."""
    hidden_size: int
    num_hidden_layers: int
    attention: GQA | MLA
    ffn: Dense | MoE
    rope: Rope
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0
    """Depth of multi-token prediction (V3, section 2.2)."""
    initializer_range: float = 0.006
    """Standard deviation of every weight at the start of pre-training, as all papers print it."""
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    dtype: Dtype = "bfloat16"
    """Compute dtype of matrix products and residuals; norms, router and softmax stay in float32 or wider."""
    param_dtype: Dtype = "float32"
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, each layer (its integers of routing are kept), or as V3 does norms and MLA
    up-projections. "offload" is "full", with the layers' inputs in the host's memory meanwhile."""
    gradient_sum: Literal["compute", "float32"] = "compute"
    """Dtype in which weights' gradients are added up over devices: the compute dtype, or float32, which is twice the bytes; a
    device's gradient of its routed experts is rounded once before. Those of embedding and head, and pieces of a batch, are
    added up in float32 always."""
    scan_layers: bool = True
    """Run stacked layers as one compiled loop; False unrolls it. The parameter tree is the same."""
    expert_exchange: Literal["ragged", "ring"] = "ragged"
    """How tokens get to experts that a mesh splits: a ragged all-to-all, or gathered and reduced by all that hold some, which
    was the faster on two GPUs (docs/benchmarks.md)."""
    expert_across_slices: bool = False
    """Split experts over a mesh's slices too, in place of a copy of all in each. A token crosses to each slice that holds some
    of its own once: at most `MoE.topk_group` slices, where the groups lie each within one (V3, section 2.1.2)."""
    expert_buffer_factor: float | None = None
    """Places of a shard for the token-expert pairs it receives, over its even share; None: room for all that can come.
    Pairs that find no place are left out, counted and logged as `overflow`. Of pre-training and fine-tuning alone."""
    expert_gather_parts: int = 1
    """Runs in which a device of a mesh gathers its experts' weights and serves their tokens: more take less memory at once,
    and gather once more for the backward pass."""
    assumed: tuple[str, ...] = ()
    """Fields that the paper leaves open and this registry fills in."""

    @property
    def wide_sums(self) -> bool:
        """Whether devices add up weights' gradients in float32 or wider: `gradient_sum`."""
        return self.gradient_sum == "float32"

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")
        _positive(self, "rms_norm_eps", "initializer_range", "expert_gather_parts")
        _not_negative(self, "num_nextn_predict_layers")

        def check(condition: bool, field: str, remedy: str) -> None:
            require(condition, "ModelConfig", field, getattr(self, field), remedy)

        check(isinstance(self.attention, GQA | MLA), "attention", "must be a GQA or an MLA")
        check(isinstance(self.ffn, Dense | MoE), "ffn", "must be a Dense or a MoE")
        check(isinstance(self.rope, Rope), "rope", "must be a Rope")
        dtypes = ("float64", "float32", "bfloat16", "float16")
        check(self.dtype in dtypes, "dtype", f"must be one of {dtypes}")
        check(self.param_dtype in dtypes, "param_dtype", f"must be one of {dtypes}")
        check(self.remat in REMATS, "remat", f"must be one of {REMATS}")
        check(self.gradient_sum in ("compute", "float32"), "gradient_sum", "must be 'compute' or 'float32'")
        check(self.expert_exchange in ("ragged", "ring"), "expert_exchange", "must be 'ragged' or 'ring'")
        check(
            self.expert_buffer_factor is None or self.expert_buffer_factor >= 1, "expert_buffer_factor",
            "must be at least 1, the even share, or None",
        )  # fmt: skip
        if isinstance(self.ffn, MoE):
            require(
                self.ffn.first_k_dense_replace <= self.num_hidden_layers,
                "MoE", "first_k_dense_replace", self.ffn.first_k_dense_replace,
                f"must not exceed num_hidden_layers = {self.num_hidden_layers}",
            )  # fmt: skip
        for field in ("bos_token_id", "eos_token_id"):
            value = getattr(self, field)
            if value is not None:
                check(0 <= value < self.vocab_size, field, f"must be a token id below vocab_size = {self.vocab_size}")
        names = {
            field.name for part in (self, self.attention, self.ffn, self.rope) for field in dataclasses.fields(part)
        }
        for name in self.assumed:
            check(name in names, "assumed", f"{name!r} is no field of this configuration")

    @property
    def num_dense_layers(self) -> int:
        """Layers with a dense feed-forward: all of a dense model, the leading ones of a MoE model."""
        return self.ffn.first_k_dense_replace if isinstance(self.ffn, MoE) else self.num_hidden_layers

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts, multi-token modules not counted."""
        return self.num_hidden_layers - self.num_dense_layers
