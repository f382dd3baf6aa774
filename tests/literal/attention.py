"""RMSNorm, rope and its scalings, attention, MHA/GQA, MLA. One sequence at a time: x is [T][D]."""

import cmath
import math

import numpy as np


def rms_norm(x, scale, eps):
    """y_i = x_i / sqrt(mean(x²) + eps) · g_i, for one vector."""
    mean_square = sum(float(value) ** 2 for value in x) / len(x)
    return np.array([value / math.sqrt(mean_square + eps) * gain for value, gain in zip(x, scale, strict=True)])


# Rope frequencies


def plain_frequencies(dim, theta):
    """theta^(-2i / dim) for the dim / 2 pairs."""
    return [theta ** (-2.0 * i / dim) for i in range(dim // 2)]


def linear_frequencies(dim, theta, factor):
    """Positions divided by the factor, which is the same as angles divided by it."""
    return [frequency / factor for frequency in plain_frequencies(dim, theta)]


def llama3_frequencies(dim, theta, factor, low_freq_factor, high_freq_factor, original):
    """Llama 3.1: wavelengths above original / low are stretched, those below original / high kept, between: blended."""
    result = []
    for frequency in plain_frequencies(dim, theta):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high_freq_factor:
            result.append(frequency)
        elif wavelength > original / low_freq_factor:
            result.append(frequency / factor)
        else:
            smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
            result.append((1 - smooth) * frequency / factor + smooth * frequency)
    return result


def yarn_frequencies(dim, theta, factor, original, beta_fast, beta_slow):
    """YaRN: pairs turning more than beta_fast times over `original` are kept, fewer than beta_slow interpolated.

    The ramp runs over whole pair indices: floor of the fast end, ceiling of the slow end, clamped to [0, dim - 1] as
    in the published code (the papers give the formula only).
    """

    def pair_of(turns):
        return dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(beta_fast)), 0)
    high = min(math.ceil(pair_of(beta_slow)), dim - 1)
    if low == high:
        high += 0.001
    result = []
    for i, frequency in enumerate(plain_frequencies(dim, theta)):
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        result.append(frequency * (1 - ramp) + frequency / factor * ramp)
    return result


def yarn_m(factor, mscale):
    """m = 0.1 · mscale · ln(factor) + 1 (V3: sqrt(1/t) = 0.1 ln s + 1; V2: 0.0707 ln s + 1)."""
    if factor <= 1:
        return 1.0
    return 0.1 * mscale * math.log(factor) + 1.0


def frequencies(rope, dim):
    """By the kind of `rope.scaling`."""
    scaling = rope.scaling
    kind = type(scaling).__name__
    if scaling is None:
        return plain_frequencies(dim, rope.theta)
    if kind == "LinearScaling":
        return linear_frequencies(dim, rope.theta, scaling.factor)
    if kind == "Llama3Scaling":
        return llama3_frequencies(
            dim, rope.theta, scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor,
            scaling.original_max_position_embeddings,
        )  # fmt: skip
    if kind == "YarnScaling":
        return yarn_frequencies(
            dim, rope.theta, scaling.factor, scaling.original_max_position_embeddings, scaling.beta_fast,
            scaling.beta_slow,
        )  # fmt: skip
    raise TypeError(kind)


def rope_amplitude(rope):
    """What cos and sin are multiplied with: m(mscale) / m(mscale_all_dim), 1 for every published member."""
    if type(rope.scaling).__name__ != "YarnScaling":
        return 1.0
    return yarn_m(rope.scaling.factor, rope.scaling.mscale) / yarn_m(rope.scaling.factor, rope.scaling.mscale_all_dim)


def mla_softmax_scale(query_dim, rope):
    """(nope + rope dims)^-½ · m(mscale_all_dim)²."""
    scale = 1 / math.sqrt(query_dim)
    if type(rope.scaling).__name__ == "YarnScaling":
        scale *= yarn_m(rope.scaling.factor, rope.scaling.mscale_all_dim) ** 2
    return scale


def rotate_half_split(x, position, inverse_frequencies, amplitude=1.0):
    """Pairs (i, i + half), as Llama's weights expect."""
    half = len(x) // 2
    out = np.zeros(len(x))
    for i in range(half):
        angle = position * inverse_frequencies[i]
        cos, sin = amplitude * math.cos(angle), amplitude * math.sin(angle)
        out[i] = x[i] * cos - x[i + half] * sin
        out[i + half] = x[i + half] * cos + x[i] * sin
    return out


def rotate_interleaved(x, position, inverse_frequencies, amplitude=1.0):
    """Pairs (0,1), (2,3), … as complex numbers times e^(i·angle), as MLA's weights expect."""
    out = np.zeros(len(x))
    for i in range(len(x) // 2):
        turned = complex(x[2 * i], x[2 * i + 1]) * cmath.rect(amplitude, position * inverse_frequencies[i])
        out[2 * i], out[2 * i + 1] = turned.real, turned.imag
    return out


def rotate(x, position, rope):
    turn = rotate_interleaved if rope.interleaved else rotate_half_split
    return turn(x, position, frequencies(rope, len(x)), rope_amplitude(rope))


# Attention


def visible(i, j, segments):
    """Query i sees key j: not later, same document, neither of them padding (segment 0)."""
    return j <= i and segments[i] != 0 and segments[j] == segments[i]


def attend(q, k, v, segments, scale):
    """softmax(q·k · scale) v for one head. q [T][H], k [T][H], v [T][V] -> [T][V]; rows that see nothing are zero."""
    out = np.zeros((len(q), len(v[0])))
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if visible(i, j, segments)]
        if not seen:
            continue
        logits = [float(np.dot(q[i], k[j])) * scale for j in seen]
        peak = max(logits)
        weights = [math.exp(logit - peak) for logit in logits]
        total = sum(weights)
        for weight, j in zip(weights, seen, strict=True):
            out[i] += weight / total * v[j]
    return out


def gqa(p, x, positions, segments, config, rope):
    """Multi-head attention; query head n reads key/value head n // (N / K)."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    T, D = x.shape
    out = np.zeros((T, D))
    for n in range(heads):
        kv = n // (heads // kv_heads)
        q, k, v = [], [], []
        for t in range(T):
            query, key, value = x[t] @ p["w_q"][:, n], x[t] @ p["w_k"][:, kv], x[t] @ p["w_v"][:, kv]
            if config.qkv_bias:
                query, key, value = query + p["b_q"][n], key + p["b_k"][kv], value + p["b_v"][kv]
            q.append(rotate(query, positions[t], rope))
            k.append(rotate(key, positions[t], rope))
            v.append(value)
        head = attend(q, k, v, segments, 1 / math.sqrt(config.head_dim))
        for t in range(T):
            out[t] += head[t] @ p["w_o"][n]
    return out


def mla_latents(p, x_t, position, config, rope, eps):
    """V2 eq. 37–43 for one token: queries of all heads (nope, rope), latent c_kv, shared rotated key."""
    nope = config.qk_nope_head_dim
    if config.q_lora_rank is None:
        query = [x_t @ p["w_q"][:, n] for n in range(config.num_attention_heads)]
    else:
        c_q = rms_norm(x_t @ p["w_dq"], p["q_norm"]["scale"], eps)
        query = [c_q @ p["w_uq"][:, n] for n in range(config.num_attention_heads)]
    q_nope = [q[:nope] for q in query]
    q_rope = [rotate(q[nope:], position, rope) for q in query]
    c_kv = rms_norm(x_t @ p["w_dkv"], p["kv_norm"]["scale"], eps)
    k_rope = rotate(x_t @ p["w_kr"], position, rope)
    return q_nope, q_rope, c_kv, k_rope


def mla(p, x, positions, segments, config, rope, eps, absorbed=False):
    """Multi-head latent attention. Expanded: per-head keys W^UK c and values W^UV c are written out. Absorbed: the
    query is carried into the latent space, attention runs over [c ; k_rope], W^UV is applied to the result."""
    T, D = x.shape
    tokens = [mla_latents(p, x[t], positions[t], config, rope, eps) for t in range(T)]
    scale = mla_softmax_scale(config.qk_nope_head_dim + config.qk_rope_head_dim, rope)
    out = np.zeros((T, D))
    for n in range(config.num_attention_heads):
        q, k, v = [], [], []
        for q_nope, q_rope, c_kv, k_rope in tokens:
            if absorbed:
                q.append(np.concatenate([p["w_uk"][:, n] @ q_nope[n], q_rope[n]]))
                k.append(np.concatenate([c_kv, k_rope]))
                v.append(c_kv)
            else:
                q.append(np.concatenate([q_nope[n], q_rope[n]]))
                k.append(np.concatenate([c_kv @ p["w_uk"][:, n], k_rope]))
                v.append(c_kv @ p["w_uv"][:, n])
        head = attend(q, k, v, segments, scale)
        for t in range(T):
            value = head[t] @ p["w_uv"][:, n] if absorbed else head[t]
            out[t] += value @ p["w_o"][n]
    return out
