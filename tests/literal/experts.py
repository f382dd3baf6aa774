"""SwiGLU, the gates of DeepSeekMoE, V2 and V3, V2's token dropping, and the layer of experts."""

import math
from dataclasses import dataclass

import numpy as np


def swiglu(p, x):
    """down(silu(gate(x)) · up(x)), for one token."""
    gate, up = x @ p["w_gate"], x @ p["w_up"]
    hidden = np.array([g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)])
    return hidden @ p["w_down"]


# Gates, for one token


@dataclass
class Choice:
    """What the gate decided for one token."""

    affinities: list[float]
    """s_i of every expert, without bias."""
    experts: list[int]
    """Selected, best first."""
    weights: list[float]
    """g_i of each selected expert, as it multiplies the expert's output."""


def softmax(logits):
    peak = max(logits)
    powers = [math.exp(logit - peak) for logit in logits]
    return [power / sum(powers) for power in powers]


def sigmoid(logit):
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def best(scores, count):
    """Indices of the `count` highest scores, best first, lower index first among equals (the papers leave ties open)."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def groups_of(n_experts, n_group):
    size = n_experts // n_group
    return [range(g * size, (g + 1) * size) for g in range(n_group)]


def inside_groups(scores, kept, groups):
    """Scores with -inf outside the kept groups: 0 would not mask, since biased scores may all be negative."""
    allowed = [i for g in kept for i in groups[g]]
    return [score if i in allowed else -math.inf for i, score in enumerate(scores)]


def select_group_limited(affinities, top_k, n_group, topk_group):
    """V2, section 2.2.2, device-limited routing: the groups that hold the highest affinity, then the best inside."""
    groups = groups_of(len(affinities), n_group)
    kept = best([max(affinities[i] for i in group) for group in groups], topk_group)
    return best(inside_groups(affinities, kept, groups), top_k)


def select_biased(affinities, bias, top_k, n_group=1, topk_group=1):
    """V3 eq. 16 with node-limited routing (section 2.1.2): groups ranked by the sum of their two highest biased scores.

    Reading: the paper ranks nodes by the sum of their K / M best affinities, 8 / 4 = 2 in V3; the published code sums
    two, of the biased scores. With a single group all experts are eligible.
    """
    biased = [s + float(b) for s, b in zip(affinities, bias, strict=True)]
    if n_group > 1:
        groups = groups_of(len(biased), n_group)
        kept = best([sum(sorted((biased[i] for i in group), reverse=True)[:2]) for group in groups], topk_group)
        biased = inside_groups(biased, kept, groups)
    return best(biased, top_k)


def select(affinities, bias, config):
    """The K experts of a token, by the rule that the configuration names."""
    if config.topk_method == "greedy":  # DeepSeekMoE eq. 10, V2-Lite
        return best(affinities, config.num_experts_per_tok)
    if config.topk_method == "group_limited_greedy":
        return select_group_limited(affinities, config.num_experts_per_tok, config.n_group, config.topk_group)
    if config.topk_method == "noaux_tc":
        return select_biased(affinities, bias, config.num_experts_per_tok, config.n_group, config.topk_group)
    raise ValueError(config.topk_method)


def gate_weights(affinities, experts, config):
    """DeepSeekMoE eq. 10 and V2: the affinities of the chosen as they are; V3 eq. 13: over their sum. Then scaled.

    The bias plays no part.
    """
    weights = [affinities[i] for i in experts]
    if config.norm_topk_prob:
        total = sum(weights)
        weights = [weight / total for weight in weights]
    return [weight * config.routed_scaling_factor for weight in weights]


def choose(logits, bias, config):
    """The gate: affinity of u·e_i (softmax in DeepSeekMoE eq. 11 and V2, sigmoid in V3 eq. 15), choice, weights."""
    affinities = [sigmoid(logit) for logit in logits] if config.scoring_func == "sigmoid" else softmax(logits)
    experts = select(affinities, bias, config)
    return Choice(affinities, experts, gate_weights(affinities, experts, config))


# Token dropping


def kept_pairs(choices, counted, n_group, n_experts, capacity_factor):
    """V2, section 2.2.4, for one sequence: which (token, expert) pairs are computed in training.

    Reading. The paper's device is a group of n_experts / n_group experts; its budget is the even share of the
    sequence's pairs times the capacity factor, `capacity_factor · T · K / n_group` with T the counted tokens, rounded
    down since pairs are whole. On each device the pairs of lowest affinity go first until the budget is met; of
    equals the earlier token is kept, and of one token the better-ranked expert. A dropped pair adds nothing; the
    weights of the others are not changed. Padding is neither counted nor kept.
    """
    tokens = [t for t in range(len(choices)) if counted[t]]
    top_k = len(choices[tokens[0]].experts) if tokens else 0
    budget = math.floor(capacity_factor * len(tokens) * top_k / n_group + 1e-9)
    kept = set()
    for group in groups_of(n_experts, n_group):
        pairs = [
            (-choices[t].affinities[i], t, rank, i)
            for t in tokens
            for rank, i in enumerate(choices[t].experts)
            if i in group
        ]
        kept.update((t, i) for _, t, _, i in sorted(pairs)[:budget])
    return kept


# The layer


def moe(p, bias, x, counted, config, dropping=False):
    """h' = Σ shared FFN(u) + Σ g_i FFN_i(u) (V2 eq. 20, V3 eq. 12), for one sequence.

    The shared experts are one SwiGLU of their summed width. `dropping`: apply the capacity of training.
    Returns the output [T][D] and the choice of every token.
    """
    choices = []
    for t in range(len(x)):
        logits = [float(np.dot(x[t], p["router"]["w"][:, e])) for e in range(config.n_routed_experts)]
        choices.append(choose(logits, bias, config))
    kept = None
    if dropping and config.capacity_factor is not None:
        kept = kept_pairs(choices, counted, config.n_group, config.n_routed_experts, config.capacity_factor)
    out = np.zeros(x.shape)
    for t in range(len(x)):
        for i, weight in zip(choices[t].experts, choices[t].weights, strict=True):
            if kept is None or (t, i) in kept:
                expert = {name: p["experts"][name][i] for name in ("w_gate", "w_up", "w_down")}
                out[t] += weight * swiglu(expert, x[t])
        if config.n_shared_experts:
            out[t] += swiglu(p["shared"], x[t])
    return out, choices, kept
