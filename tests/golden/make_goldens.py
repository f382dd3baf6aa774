"""Regenerate the golden files: tiny random checkpoints and what transformers computes with them.

    pip install -e '.[parity]'
    python tests/golden/make_goldens.py [CASE ...]

Each case is a folder that is also a checkpoint in the published layout, so that any library can load it:

    config.json            as published (rope_theta and rope_scaling at the top level)
    model.safetensors      float32 weights under the published tensor names, multi-token modules as layers L, L+1, …
    expected.safetensors   tokens [B, T] int32; logits [B, T, W] float32; mtp_logits [depth, B, T, W] float32

`mtp_logits[k - 1, :, i]` predicts token i + k + 1; the last k positions of depth k have no input token and hold zeros.
The model runs in float64 (transformers keeps norms and router in float32 inside), the result is stored as float32.
Numpy draws the weights, so the checkpoints are the same whatever the version of torch.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

FOLDER = Path(__file__).parent

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
    "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
    "tie_word_embeddings": False, "rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": 256,
}  # fmt: skip
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "bos_token_id": 0,
    "eos_token_id": 1, "rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False,
    "rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": 256, "use_sliding_window": False,
}  # fmt: skip
MLA = {
    "attention_bias": False, "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-6,
    "initializer_range": 0.02, "tie_word_embeddings": False, "rope_theta": 10000, "moe_layer_freq": 1,
    "seq_aux": True, "max_position_embeddings": 2560,
}  # fmt: skip
DEEPSEEK_V2 = {
    **MLA, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "scoring_func": "softmax",
    "norm_topk_prob": False, "aux_loss_alpha": 0.001,
}  # fmt: skip
DEEPSEEK_V3 = {
    **MLA, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "aux_loss_alpha": 0.001,
}  # fmt: skip

# A small original length lets the ramp of YaRN and the bands of llama3 fall inside these few frequencies.
CASES = {
    "llama_mha": LLAMA | {
        "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 67,
    },
    "llama_gqa_linear": LLAMA | {
        "hidden_size": 36, "intermediate_size": 58, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 71, "rope_theta": 100000,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
    },
    "llama_llama3": LLAMA | {
        "hidden_size": 40, "intermediate_size": 58, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 1, "vocab_size": 59, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
    },
    "qwen2": QWEN2 | {
        "hidden_size": 40, "intermediate_size": 60, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 61,
    },
    "qwen2_tied": QWEN2 | {
        "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "vocab_size": 83, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    },
    "deepseek_v2_lite": DEEPSEEK_V2 | {
        "hidden_size": 36, "intermediate_size": 60, "moe_intermediate_size": 14, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 61, "q_lora_rank": None,
        "max_position_embeddings": 40960, "kv_lora_rank": 18, "qk_nope_head_dim": 12, "qk_rope_head_dim": 16,
        "v_head_dim": 10, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1,
        "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 1024, "type": "yarn",
        },
    },
    "deepseek_v2": DEEPSEEK_V2 | {
        "hidden_size": 36, "intermediate_size": 64, "moe_intermediate_size": 12, "num_hidden_layers": 3,
        "num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": 67, "q_lora_rank": 22,
        "kv_lora_rank": 20, "qk_nope_head_dim": 10, "qk_rope_head_dim": 8, "v_head_dim": 14,
        "n_routed_experts": 12, "n_shared_experts": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 3.5,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 64, "type": "yarn",
        },
    },
    "deepseek_v3": DEEPSEEK_V3 | {
        "hidden_size": 32, "intermediate_size": 52, "moe_intermediate_size": 10, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 59, "q_lora_rank": 18, "max_position_embeddings": 40960,
        "kv_lora_rank": 14, "qk_nope_head_dim": 8, "qk_rope_head_dim": 16, "v_head_dim": 12,
        "n_routed_experts": 12, "n_shared_experts": 1, "num_experts_per_tok": 4, "first_k_dense_replace": 2,
        "n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 1,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 1024, "type": "yarn",
        },
    },
    "deepseek_v3_no_groups": DEEPSEEK_V3 | {
        "hidden_size": 32, "intermediate_size": 60, "moe_intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 61, "q_lora_rank": None,
        "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 12, "v_head_dim": 18,
        "n_routed_experts": 9, "n_shared_experts": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 2, "rope_scaling": None,
    },
    "deepseek_v3_negative_bias": DEEPSEEK_V3 | {
        "hidden_size": 30, "intermediate_size": 50, "moe_intermediate_size": 10, "num_hidden_layers": 3,
        "num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": 61, "q_lora_rank": 20, "max_position_embeddings": 512,
        "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "n_routed_experts": 12, "n_shared_experts": 1, "num_experts_per_tok": 3, "first_k_dense_replace": 1,
        "n_group": 3, "topk_group": 1, "num_nextn_predict_layers": 1,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 8, "mscale": 1.0, "mscale_all_dim": 0.8,
            "original_max_position_embeddings": 64, "type": "yarn",
        },
    },
}  # fmt: skip
BATCH, LENGTHS = 2, {"llama_llama3": 48, "deepseek_v3_no_groups": 33}
LENGTH = 40


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a published checkpoint with this config.json holds."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {}

    def mlp(prefix: str, width: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = (width, hidden)
        shapes[f"{prefix}.up_proj.weight"] = (width, hidden)
        shapes[f"{prefix}.down_proj.weight"] = (hidden, width)

    def layer(prefix: str, dense: bool) -> None:
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        attention = f"{prefix}.self_attn"
        if "kv_lora_rank" in config:
            query, latent = config["q_lora_rank"], config["kv_lora_rank"]
            nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
            if query is None:
                shapes[f"{attention}.q_proj.weight"] = (heads * (nope + rope), hidden)
            else:
                shapes[f"{attention}.q_a_proj.weight"] = (query, hidden)
                shapes[f"{attention}.q_a_layernorm.weight"] = (query,)
                shapes[f"{attention}.q_b_proj.weight"] = (heads * (nope + rope), query)
            shapes[f"{attention}.kv_a_proj_with_mqa.weight"] = (latent + rope, hidden)
            shapes[f"{attention}.kv_a_layernorm.weight"] = (latent,)
            shapes[f"{attention}.kv_b_proj.weight"] = (heads * (nope + value), latent)
            shapes[f"{attention}.o_proj.weight"] = (hidden, heads * value)
        else:
            head_dim = hidden // heads
            for name, count in (
                ("q", heads),
                ("k", config["num_key_value_heads"]),
                ("v", config["num_key_value_heads"]),
            ):
                shapes[f"{attention}.{name}_proj.weight"] = (count * head_dim, hidden)
                if config["model_type"] == "qwen2":
                    shapes[f"{attention}.{name}_proj.bias"] = (count * head_dim,)
            shapes[f"{attention}.o_proj.weight"] = (hidden, heads * head_dim)
        if dense:
            mlp(f"{prefix}.mlp", config["intermediate_size"])
            return
        shapes[f"{prefix}.mlp.gate.weight"] = (config["n_routed_experts"], hidden)
        if config["topk_method"] == "noaux_tc":
            shapes[f"{prefix}.mlp.gate.e_score_correction_bias"] = (config["n_routed_experts"],)
        for expert in range(config["n_routed_experts"]):
            mlp(f"{prefix}.mlp.experts.{expert}", config["moe_intermediate_size"])
        mlp(f"{prefix}.mlp.shared_experts", config["moe_intermediate_size"] * config["n_shared_experts"])

    layers, depth = config["num_hidden_layers"], config.get("num_nextn_predict_layers", 0)
    shapes["model.embed_tokens.weight"] = (config["vocab_size"], hidden)
    for index in range(layers):
        layer(f"model.layers.{index}", dense=index < config.get("first_k_dense_replace", layers))
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for index in range(layers, layers + depth):
        prefix = f"model.layers.{index}"
        shapes[f"{prefix}.embed_tokens.weight"] = (config["vocab_size"], hidden)
        shapes[f"{prefix}.enorm.weight"] = (hidden,)
        shapes[f"{prefix}.hnorm.weight"] = (hidden,)
        shapes[f"{prefix}.eh_proj.weight"] = (hidden, 2 * hidden)
        layer(prefix, dense=False)
        shapes[f"{prefix}.shared_head.norm.weight"] = (hidden,)
        shapes[f"{prefix}.shared_head.head.weight"] = (config["vocab_size"], hidden)
    return shapes


def random_weights(config: dict, seed: int, bias: tuple[float, float] = (-0.3, 0.3)) -> dict[str, np.ndarray]:
    """Weights under which every part matters: norms off 1, gate biases set, projections of about unit gain."""
    draw = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    for name, shape in tensor_shapes(config).items():
        if name.endswith("shared_head.head.weight"):
            value = weights["lm_head.weight"].copy()
        elif name.endswith("embed_tokens.weight") and name != "model.embed_tokens.weight":
            value = weights["model.embed_tokens.weight"].copy()
        elif name.endswith("norm.weight"):
            value = draw.uniform(0.5, 1.5, shape)
        elif name.endswith("e_score_correction_bias"):
            value = draw.uniform(*bias, shape)
        elif name.endswith("mlp.gate.weight"):
            value = draw.normal(0.0, 0.25, shape)
        elif name.endswith(".bias"):
            value = draw.normal(0.0, 0.3, shape)
        else:
            value = draw.normal(0.0, 0.16, shape)
        weights[name] = value.astype(np.float32)
    return weights


def write_checkpoint(folder: Path, config: dict, weights: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def selection_margin(model: torch.nn.Module, margins: list[float]) -> None:
    """Record, at every router call, how near the choice of experts was to falling the other way."""

    def hook(module: torch.nn.Module, inputs: tuple, output: tuple) -> None:
        logits, _, chosen = output
        biased = hasattr(module, "e_score_correction_bias")
        scores = logits.sigmoid() + module.e_score_correction_bias if biased else logits.softmax(-1)
        groups = getattr(module, "num_group", None) or 1
        if groups > (module.topk_group or 1) and (biased or module.topk_method == "group_limited_greedy"):
            by_group = scores.view(len(scores), groups, -1)
            best = by_group.topk(2, -1)[0].sum(-1) if biased else by_group.amax(-1)
            ordered = best.sort(-1, descending=True)[0]
            margins.append(float((ordered[:, module.topk_group - 1] - ordered[:, module.topk_group]).min()))
            kept = best >= ordered[:, module.topk_group - 1 : module.topk_group]
            scores = by_group.masked_fill(~kept[..., None], float("-inf")).flatten(1)
        ordered, order = scores.sort(-1, descending=True)
        assert (order[:, : module.top_k].sort(-1)[0] == chosen.sort(-1)[0]).all()
        margins.append(float((ordered[:, module.top_k - 1] - ordered[:, module.top_k]).min()))

    for module in model.modules():
        if type(module).__name__.endswith("TopkRouter"):
            module.register_forward_hook(hook)


def transformers_logits(folder: Path, tokens: np.ndarray, dtype: torch.dtype = torch.float64) -> dict[str, np.ndarray]:
    """Logits and multi-token logits of the checkpoint in `folder`, computed by transformers; smallest routing margin."""
    main, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"], report
    main = main.eval().to(dtype)
    margins: list[float] = []
    selection_margin(main, margins)
    ids = torch.from_numpy(tokens).long()
    depth = getattr(main.config, "num_nextn_predict_layers", None) or 0
    layers = main.config.num_hidden_layers
    mtp_logits = np.zeros((depth, *tokens.shape, main.config.vocab_size), np.float32)
    with torch.no_grad():
        output = main(ids, output_hidden_states=True, use_cache=False)
        if depth:
            # transformers spells the pattern of the multi-token tensors for the 61 layers of the published V3.
            main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layers + k}\..*" for k in range(depth)]
            mtp = MtpModel.from_pretrained(main).eval().to(dtype)
            selection_margin(mtp.layers, margins)
            cache = MtpCache(config=main.config.get_mtp_config())
            hidden = output.hidden_states[-1]
            length = tokens.shape[1]
            for k in range(depth):
                valid = length - 1 - k
                hidden = mtp.forward_layer(
                    k, hidden[:, :valid], torch.arange(k + 1, length)[None], cache, input_ids=ids[:, k + 1 :]
                )
                mtp_logits[k, :, :valid] = mtp._project_to_logits(hidden).float().numpy()
            # The same through the drafting loop of generate: its first draft is depth 1 at the last position.
            _, drafted, _ = mtp(
                ids[:, 1:], output.hidden_states[-1][:, :-1], None, torch.arange(1, length)[None],
                MtpCache(config=main.config.get_mtp_config()),
            )  # fmt: skip
            assert np.allclose(drafted[:, 0].numpy(), mtp_logits[0, :, length - 2], atol=1e-5)
    return {
        "logits": output.logits.float().numpy(),
        "mtp_logits": mtp_logits,
        "margin": np.float32(min(margins, default=1.0)),
    }


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    for number, (name, config) in enumerate(CASES.items()):
        if names and name not in names:
            continue
        bias = (-3.0, -1.5) if name == "deepseek_v3_negative_bias" else (-0.3, 0.3)
        folder = FOLDER / name
        for attempt in range(100):  # the first seed under which no choice of experts hangs on rounding
            seed = 1000 * number + attempt
            write_checkpoint(folder, config, random_weights(config, seed, bias))
            tokens = np.random.default_rng(seed).integers(
                0, config["vocab_size"], (BATCH, LENGTHS.get(name, LENGTH)), dtype=np.int32
            )
            result = transformers_logits(folder, tokens)
            margin = result.pop("margin")
            if margin > 5e-5:
                break
        else:
            raise RuntimeError(f"{name}: no seed keeps the choice of experts {margin} away from a tie")
        single = transformers_logits(folder, tokens, torch.float32)
        if not len(result["mtp_logits"]):
            del result["mtp_logits"]
        save_file({"tokens": tokens, **result}, folder / "expected.safetensors")
        spread = np.abs(result["logits"]).max()
        apart = np.abs(single["logits"] - result["logits"]).max() / spread
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(
            f"{name:28s} {size / 1024:6.0f} KiB  |logits| <= {spread:.2f}  float32 apart {apart:.1e}  "
            f"margin {margin:.1e}  seed {seed}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
