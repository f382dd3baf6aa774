"""The policy objectives of DeepSeekMath, V2/V3/R1 and V3.2, token by token as they are printed. Python floats."""

import math


def objective(config, logp, old, advantage, mask, reference=None, sampler=None):
    """J of a batch, each argument a list of rows of lists; to be maximised. A row without counted tokens does not exist."""
    rows = [[t for t in range(len(mask[i])) if mask[i][t]] for i in range(len(mask))]
    alive = [i for i in range(len(rows)) if rows[i]]
    all_tokens = sum(len(rows[i]) for i in alive)
    J = 0.0
    for i in alive:
        o = rows[i]
        A = [advantage[i][t] for t in o]
        sampled = old if sampler is None else sampler  # V3.2: as the inference framework returned it
        drift = sum(sampled[i][t] - logp[i][t] for t in o) / len(o)
        M = 1.0
        if config.off_policy_mask is not None and sum(A) < 0 and drift > config.off_policy_mask:
            M = 0.0
        policy = []
        if config.ratio == "sequence":
            rho = math.exp(sum(logp[i][t] - old[i][t] for t in o))
            weight = 1.0
            if config.importance_cap is not None:
                weight = min(math.exp(sum(old[i][t] - sampler[i][t] for t in o)), config.importance_cap)
            policy = [weight * _clipped(config, rho, sum(A) / len(A))]
        else:
            for t in o:
                weight = 1.0
                if config.importance_cap is not None:
                    weight = min(math.exp(old[i][t] - sampler[i][t]), config.importance_cap)
                policy.append(weight * _clipped(config, math.exp(logp[i][t] - old[i][t]), advantage[i][t]))
        divergence = []
        for t in o:
            D = 0.0
            if config.kl:
                r = math.exp(reference[i][t] - logp[i][t])
                D = {"k1": -math.log(r), "k2": math.log(r) ** 2 / 2, "k3": r - math.log(r) - 1}[config.kl_estimator]
                if config.unbiased_kl:
                    D *= math.exp(logp[i][t] - old[i][t])
            divergence.append(D)
        if config.aggregation == "grpo":
            J += (M * sum(policy) / len(policy) - config.kl * sum(divergence) / len(o)) / len(alive)
        elif config.aggregation == "dapo":
            J += (M * sum(policy) - config.kl * sum(divergence)) / all_tokens
        else:
            J += (M * sum(policy) - config.kl * sum(divergence)) / (len(alive) * config.max_tokens)
    return J


def _clipped(config, rho, A):
    term = min(rho * A, max(1 - config.clip_low, min(rho, 1 + config.clip_high)) * A)
    if config.dual_clip is not None and A < 0:
        term = max(term, config.dual_clip * A)
    return term


def outcome_advantages(rewards, groups, scale):
    """(r − mean) / std over the completions of a prompt; 0 where all are alike."""
    out = []
    mean_all = sum(rewards) / len(rewards)
    std_all = math.sqrt(sum((r - mean_all) ** 2 for r in rewards) / len(rewards))
    for reward, group in zip(rewards, groups, strict=True):
        mine = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        mean = sum(mine) / len(mine)
        std = math.sqrt(sum((r - mean) ** 2 for r in mine) / len(mine))
        divisor = {"group": std, "batch": std_all, "none": 1.0}[scale]
        out.append(0.0 if std == 0 else (reward - mean) / divisor)
    return out


def process_advantages(steps, groups):
    """`steps[i]`: (place of the step's end, reward) of completion i; result: a function of i and t."""
    normalised = []
    for i, mine in enumerate(steps):
        rewards = [r for j in range(len(steps)) if groups[j] == groups[i] for _, r in steps[j]]
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
        normalised.append([(end, (r - mean) / std if std else 0.0) for end, r in mine])
    return lambda i, t: sum(r for end, r in normalised[i] if end >= t)
