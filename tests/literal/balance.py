"""Balance losses of DeepSeekMoE, V2 and V3, each for one sequence and one layer, and the bias update of V3.

T is the number of counted tokens of the sequence: no padding, and in a multi-token module only tokens whose target
lies in the document. N experts, K selected per token, D groups (the papers' devices), M groups a token may reach.
All losses but V3's use the gate's softmax affinities s as they are; counts are of what the gate selected, before any
token is dropped, and carry no gradient.
"""

from .experts import best, groups_of


def expert_loss(choices, n_experts, top_k, alpha):
    """DeepSeekMoE eq. 12–14, V2 eq. 23–25: α Σ_i f_i P_i, f_i = N/(K T) · #(i selected), P_i = mean s_i."""
    T, loss = len(choices), 0.0
    for i in range(n_experts):
        f = n_experts / (top_k * T) * sum(i in choice.experts for choice in choices)
        P = sum(choice.affinities[i] for choice in choices) / T
        loss += f * P
    return alpha * loss


def device_loss(choices, n_experts, top_k, n_group, alpha):
    """DeepSeekMoE eq. 15–17, V2 eq. 26–28: f'_g = mean of its experts' f, P'_g = sum of its experts' P."""
    T, loss = len(choices), 0.0
    for group in groups_of(n_experts, n_group):
        f = P = 0.0
        for i in group:
            f += n_experts / (top_k * T) * sum(i in choice.experts for choice in choices) / len(group)
            P += sum(choice.affinities[i] for choice in choices) / T
        loss += f * P
    return alpha * loss


def communication_loss(choices, n_experts, n_group, topk_group, alpha):
    """V2 eq. 29–31: f''_g = D/(M T) · #(tokens sent to device g), P''_g as P'_g. A token goes to a device once."""
    T, loss = len(choices), 0.0
    for group in groups_of(n_experts, n_group):
        sent = sum(any(i in choice.experts for i in group) for choice in choices)
        P = sum(choice.affinities[i] for choice in choices for i in group) / T
        loss += n_group / (topk_group * T) * sent * P
    return alpha * loss


def sequence_loss(choices, n_experts, top_k, alpha):
    """V3 eq. 17–20: f_i counts the top K of the affinities without bias or groups (eq. 18 as printed), P_i averages
    the affinities normalised over the experts (eq. 19)."""
    T, loss = len(choices), 0.0
    for i in range(n_experts):
        f = n_experts / (top_k * T) * sum(i in best(choice.affinities, top_k) for choice in choices)
        P = sum(choice.affinities[i] / sum(choice.affinities) for choice in choices) / T
        loss += f * P
    return alpha * loss


def sequence_losses(choices, counted, config):
    """All balance losses of one sequence by name; only those whose factor is set. A sequence without tokens has 0."""
    chosen = [choice for choice, counts in zip(choices, counted, strict=True) if counts]
    n, k = config.n_routed_experts, config.num_experts_per_tok
    losses = {}
    if config.expert_loss_alpha:
        losses["expert"] = expert_loss(chosen, n, k, config.expert_loss_alpha) if chosen else 0.0
    if config.device_loss_alpha:
        losses["device"] = device_loss(chosen, n, k, config.n_group, config.device_loss_alpha) if chosen else 0.0
    if config.communication_loss_alpha:
        losses["communication"] = (
            communication_loss(chosen, n, config.n_group, config.topk_group, config.communication_loss_alpha)
            if chosen else 0.0
        )  # fmt: skip
    if config.sequence_loss_alpha:
        losses["sequence"] = sequence_loss(chosen, n, k, config.sequence_loss_alpha) if chosen else 0.0
    return losses


def load(choices, counted, n_experts):
    """Pairs selected per expert, before dropping."""
    return [
        sum(i in choice.experts for choice, counts in zip(choices, counted, strict=True) if counts)
        for i in range(n_experts)
    ]


def updated_bias(bias, load, speed):
    """V3, section 2.1.2: after a step, b_i falls by γ where expert i was overloaded, rises where underloaded.

    Reading: over- and underloaded against the mean load of the layer over the whole batch; exactly at it: unchanged.
    """
    mean = sum(load) / len(load)
    result = []
    for b, count in zip(bias, load, strict=True):
        if count > mean:
            b = b - speed
        elif count < mean:
            b = b + speed
        result.append(b)
    return result
