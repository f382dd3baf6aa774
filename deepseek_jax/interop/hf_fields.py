"""The fields of a config.json, each accounted for, and rope's in both spellings."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from deepseek_jax.config import LinearScaling, Llama3Scaling, Rope, YarnScaling

_MISSING: Any = object()

# Fields that change nothing that is computed here.
_FREE = {
    "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache", "pad_token_id",
    "_name_or_path", "name_or_path", "pretraining_tp", "ep_size", "output_router_logits", "max_window_layers",
    "sliding_window", "model_type", "attention_dropout", "_attn_implementation",
}  # fmt: skip
# Fields that must have this value, or be null or absent.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1, "rope_interleave": True,
    "use_sliding_window": False, "use_mrope": False, "is_encoder_decoder": False,
}  # fmt: skip


class Fields:
    """A config.json that knows which of its fields were looked at."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self._known = {*_FREE, *_FIXED}

    def wrong(self, field: str, value: Any, remedy: str) -> ValueError:
        return ValueError(f"config.json: {field} = {value!r}: {remedy}")

    def take(self, field: str, kind: type, default: Any = _MISSING) -> Any:
        """The field's value; null counts as absent where there is a default."""
        self._known.add(field)
        value = self.config.get(field)
        if value is None:
            if default is _MISSING:
                raise ValueError(f"config.json: {field} is missing: must be of type {kind.__name__}")
            return default
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind and not (kind is dict and isinstance(value, Mapping)):
            raise self.wrong(field, value, f"must be of type {kind.__name__}")
        return value

    def same(self, field: str, value: Any, why: str) -> None:
        """Raises where the field is there and is not `value`, which `why` says."""
        self._known.add(field)
        given = self.config.get(field)
        if given is not None and given != value:
            raise self.wrong(field, given, f"contradicts {why}, which gives {value!r}")

    def finish(self) -> None:
        """Raises for fields that nobody looked at, or with a value that is not computed here."""
        for field, only in _FIXED.items():
            given = self.config.get(field)
            if given is not None and given != only:
                raise self.wrong(field, given, f"only {only!r} is computed here")
        layers = self.config.get("layer_types")
        if layers is not None and set(layers) != {"full_attention"}:
            raise self.wrong("layer_types", layers, "only 'full_attention' is computed here")
        if self.config.get("attention_dropout") not in (None, 0, 0.0):
            raise self.wrong("attention_dropout", self.config["attention_dropout"], "only 0 is computed here")
        unknown = [field for field in self.config if field not in self._known and field != "layer_types"]
        if unknown:
            close = difflib.get_close_matches(unknown[0], sorted(self._known), n=1, cutoff=0.8)
            hint = f"did you mean {close[0]!r}?" if close else "take it out if it changes nothing that is computed"
            raise ValueError(
                f"config.json: unknown fields {unknown} of model_type {self.config['model_type']!r}: {hint}"
            )


def rope_from_hf(fields: Fields, latent: bool) -> Rope:
    """`rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters`, or both where they agree."""
    theta, scaling, stated = fields.take("rope_theta", float, None), None, []
    for name in ("rope_scaling", "rope_parameters"):  # either may hold the base too
        given = fields.take(name, dict, None)
        if given is None:
            continue
        inner = given.get("rope_theta")
        if theta is not None and inner not in (None, theta):
            raise fields.wrong("rope_theta", theta, f"contradicts {name}, which gives {inner!r}")
        theta = inner if theta is None else theta
        scaling = _scaling(fields, name, {k: v for k, v in given.items() if k != "rope_theta"}, latent)
        stated.append(scaling)
    if len(stated) == 2 and stated[0] != stated[1]:
        raise fields.wrong(
            "rope_scaling", fields.config["rope_scaling"],
            f"contradicts rope_parameters = {fields.config['rope_parameters']!r}",
        )  # fmt: skip
    if theta is None:
        theta = 10000.0  # what every format means where it says nothing
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise fields.wrong("rope_theta", theta, "must be a number")
    return Rope(theta=float(theta), interleaved=latent, scaling=scaling)


def _scaling(fields: Fields, name: str, given: Mapping[str, Any], latent: bool) -> Any:
    values = dict(given)
    kinds = {values.pop(key) for key in ("rope_type", "type") if key in values}
    if len(kinds) != 1:
        raise fields.wrong(name, dict(given), "needs one kind, as type or rope_type")
    [kind] = kinds
    classes = {"linear": LinearScaling, "llama3": Llama3Scaling, "yarn": YarnScaling}
    if kind != "default" and kind not in classes:
        raise fields.wrong(name, dict(given), f"kind {kind!r}: known are default, {', '.join(classes)}")
    if kind == "yarn":
        # DeepSeek's code and transformers agree where both are given, or neither: then no softmax temperature.
        if len({"mscale", "mscale_all_dim"} & set(values)) == 1 or 0 in (
            values.get("mscale"),
            values.get("mscale_all_dim"),
        ):
            raise fields.wrong(name, dict(given), "give mscale and mscale_all_dim both, above 0, or neither")
        if "mscale_all_dim" in values and not latent:
            raise fields.wrong(name, dict(given), "mscale_all_dim belongs to MLA")
        values = {"mscale_all_dim": 0.0, **values}
    allowed = set(classes[kind].__dataclass_fields__) if kind != "default" else set()
    if unknown := sorted(set(values) - allowed):
        raise fields.wrong(name, dict(given), f"unknown in a {kind} scaling: {unknown}; known: {sorted(allowed)}")
    if kind == "default":
        return None
    for field, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise fields.wrong(f"{name}.{field}", value, "must be a number")
        values[field] = int(value) if field.startswith("original") else float(value)
    try:
        return classes[kind](**values)
    except TypeError as error:
        raise fields.wrong(name, dict(given), str(error).split("__init__()")[-1].strip()) from None


def scaling_to_hf(scaling: None | LinearScaling | Llama3Scaling | YarnScaling) -> dict[str, Any] | None:
    if scaling is None:
        return None
    kind = {LinearScaling: "linear", Llama3Scaling: "llama3", YarnScaling: "yarn"}[type(scaling)]
    fields = {name: getattr(scaling, name) for name in scaling.__dataclass_fields__}
    if isinstance(scaling, YarnScaling) and scaling.mscale == 1 and scaling.mscale_all_dim == 0:
        del fields["mscale"], fields["mscale_all_dim"]
    return fields | {"type": kind, "rope_type": kind}
