"""Values that settings can have: each check raises one line that names the setting, its value and what it must be."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        known = ", ".join("none" if choice is None else str(choice) for choice in choices)
        raise ValueError(f"{name}={value!r} is unknown: use one of {known}")


def check_whole(name: str, value: object, *, minimum: int, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {minimum}")


def check_number(
    name: str,
    value: float | None,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    optional: bool = False,
) -> None:
    if optional and value is None:
        return
    limits = [("above", above), ("at least", at_least), ("below", below), ("at most", at_most)]
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if fits and value is not None:
        fits = (above is None or value > above) and (at_least is None or value >= at_least)
        fits = fits and (below is None or value < below) and (at_most is None or value <= at_most)
    if not fits:
        wanted = " and ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None) or "finite"
        raise ValueError(f"{name}={value!r} must be a number {wanted}")


def check_used(section: str, config: Any, used: bool, needs: str, *names: str) -> None:
    """ValueError for a field of `names` that is not as it is by default where nothing reads it."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for name in names:
        if not used and getattr(config, name) != defaults[name]:
            raise ValueError(f"{section}.{name}={getattr(config, name)!r} has no effect without {needs}: drop it")
