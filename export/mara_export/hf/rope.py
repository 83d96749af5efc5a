"""Rotary settings, which transformers keeps in two ways.

Version 4 has `rope_theta`, `rope_scaling` and `partial_rotary_factor` side by side, in a config.json as on the object
that it makes of it. Version 5 has all of them in `rope_parameters`, of which `rope_scaling` is another name; it reads
both kinds of file. Everything that depends on this is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mara_export.errors import ModelError

_BESIDE = ("rope_theta", "partial_rotary_factor")
"""what version 4 keeps beside rope_scaling"""


def kept_together(config: Any) -> bool:
    """Whether a configuration object keeps its rotary settings as transformers 5 does."""
    return isinstance(getattr(type(config), "rope_scaling", None), property)


def rope_kinds(config: Any) -> list[dict[str, Any]]:
    """What scales the angles of a configuration object, by name: once, or for each kind of layer that has its own."""
    together = (config.rope_parameters if kept_together(config) else getattr(config, "rope_scaling", None)) or {}
    kinds = [*together.values()] if _by_layer(together) else [together]
    if not kept_together(config):
        return [dict(kind) for kind in kinds]
    return [{name: value for name, value in kind.items() if name not in _BESIDE} for kind in kinds]


def rotated_part(config: Any) -> Any:
    """Fraction of each head that a configuration rotates, if it gives one for all layers; else 1."""
    together = getattr(config, "rope_parameters", None) if kept_together(config) else None
    part = (together or {}).get("partial_rotary_factor")
    return getattr(config, "partial_rotary_factor", None) or 1 if part is None else part


def _by_layer(together: Mapping[str, Any]) -> bool:
    """Whether these are rotary settings per kind of layer, as only version 5 writes them."""
    return bool(together) and all(isinstance(value, dict) for value in together.values())


def check_rope(said: Mapping[str, Any], name: str) -> None:
    """Reject a config.json whose rotary settings contradict each other, or mean different things to versions 4 and 5.

    said: its content; name: of the model, for messages. Raises ModelError.
    """
    scaling, together = said.get("rope_scaling") or {}, said.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise ModelError(f"{name}: its config.json has rope_scaling = {scaling!r}; expected a JSON object")
    if scaling.get("type", scaling.get("rope_type")) != scaling.get("rope_type", scaling.get("type")):
        raise ModelError(
            f"{name}: its config.json says twice of what type rope_scaling is, {scaling['type']!r} and "
            f"{scaling['rope_type']!r}: remove the wrong one"
        )
    if inside := [key for key in _BESIDE if key in scaling]:
        raise ModelError(
            f"{name}: its config.json has {inside[0]} in rope_scaling, where transformers 4 does not read it: move it "
            "out of there"
        )
    if not isinstance(together, dict):
        raise ModelError(f"{name}: its config.json has rope_parameters = {together!r}; expected a JSON object")
    if _by_layer(together):
        return
    if any(isinstance(value, dict) for value in together.values()):
        raise ModelError(f"{name}: its config.json has rope_parameters of some kinds of layers among those of all")
    for key, new in _apart(together).items():
        if said.get(key) is not None and said[key] != new:
            raise ModelError(
                f"{name}: its config.json says {key} twice, as {said[key]!r} and, in rope_parameters, as {new!r}: "
                "remove the wrong one"
            )


def complete_rope(config: Any, said: Mapping[str, Any], name: str) -> None:
    """Give a configuration object the `rope_parameters` of its config.json.

    said: its content, which is checked; name: of the model, for messages. Raises ModelError for what transformers 4 has
    no place for.
    """
    together = said.get("rope_parameters")
    if not together:
        return
    if _by_layer(together):
        if not kept_together(config):
            raise ModelError(
                f"{name}: its config.json has rope_parameters for each kind of layer, which transformers 4 does not "
                "read: pip install 'mara-deploy[export-torch]'"
            )
        return
    if kept_together(config):  # it passes over what is not in rope_scaling, if there is one
        config.rope_parameters = {**config.rope_parameters, **together}
    else:  # it passes over all, and would use its defaults
        for key, value in _apart(together).items():
            setattr(config, key, value)


def missing_rope(said: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says in `rope_parameters` alone, under its names in version 4. said: its content."""
    together = _apart(said.get("rope_parameters") or {})
    return {name: value for name, value in together.items() if value is not None and said.get(name) is None}


def _apart(together: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` as version 4 has them: nothing if there are none."""
    if not together:
        return {}
    scaling = {name: value for name, value in together.items() if name not in _BESIDE}
    beside = {name: together[name] for name in _BESIDE if name in together}
    return {**beside, "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling}
