"""Converts the settings of configurations that earlier versions have saved to the current names."""

from collections.abc import Mapping
from typing import Any

from .messages import shown

FORMER_NAMES = {  # former name: current name
    "query_key_norm": "use_qk_norm",
    "feed_forward_bias": "mlp_bias",
    "layer_rope_theta": "rope_parameters",
}
FORMER_VALUES = {"norm_placement": {"after": "post", "before": "pre"}}
# The layer types for which transformers' caches hold keys and values.
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


def with_current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a saved configuration under their current names.

    Args:
        settings (`dict[str, Any]`): The contents of a `config.json`, which are not modified.

    Raises:
        ValueError: A setting is given under both of its names; `layer_rope_theta` cannot be expressed by layer types.
    """
    current = {name: value for name, value in settings.items() if name not in FORMER_NAMES}
    bases = settings.get("layer_rope_theta")
    for former in FORMER_NAMES.keys() & settings.keys() - {"layer_rope_theta"}:
        name = FORMER_NAMES[former]
        if name in settings:
            raise ValueError(f"`{former}` is a former name of `{name}`, and only one of them may be given; got both")
        current[name] = settings[former]
    for name, values in FORMER_VALUES.items():
        if isinstance(settings.get(name), str):
            current[name] = values.get(settings[name], settings[name])
    return current if bases is None else current | _by_layer_type(bases, settings.get("rope_parameters") or {})


def _by_layer_type(bases: Any, common: Any) -> dict[str, Any]:
    """`layer_types` and `rope_parameters` that give each layer its base, with one layer type per distinct base."""
    if not (isinstance(bases, list | tuple) and all(isinstance(base, int | float) for base in bases)):
        raise ValueError(f"`layer_rope_theta` must be a list of numbers; got {shown(bases)}")
    if not isinstance(common, dict):
        raise ValueError(f"`rope_parameters` must be a dictionary; got {shown(common)}")
    distinct = list(dict.fromkeys(bases))
    if len(distinct) > len(LAYER_TYPES):
        raise ValueError(f"`layer_rope_theta` must have at most {len(LAYER_TYPES)} different bases; got {shown(bases)}")
    types = dict(zip(distinct, LAYER_TYPES, strict=False))
    return {
        "layer_types": [types[base] for base in bases],
        "rope_parameters": {kind: {**common, "rope_theta": base} for base, kind in types.items()},
    }


__all__ = []
