"""What a result file must hold for its readers: every field they read, with its type and range.

Files come from other machines and versions, by hand and by mail. What is checked here need not be
checked where it is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

# Products and quotients of two numbers between these are numbers.
_SMALLEST, _LARGEST = 1e-100, 1e100
_DEEPEST = 32


@dataclass(frozen=True)
class _Kind:
    """Values that `holds` is true of; `name` is how a message calls them."""

    name: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class _ListOf:
    item: _Spec
    empty: bool = False


@dataclass(frozen=True)
class _OrNull:
    value: _Spec


@dataclass(frozen=True)
class _OrMissing:
    value: _Spec


# An object's fields; those that are not named may be anything.
_Spec: TypeAlias = _Kind | _ListOf | _OrNull | _OrMissing | Mapping[str, "_Spec"]


def _is_number(value: Any, low: float) -> bool:
    return type(value) in (int, float) and low <= value <= _LARGEST


def _is_whole(value: Any, low: int) -> bool:
    return type(value) is int and low <= value < 2**63


def _is_name(value: Any) -> bool:
    return (
        type(value) is str
        and len(value) <= 300
        and not any(c < " " or "\x7f" <= c <= "\x9f" for c in value)
    )


_TEXT = _Kind("text", lambda value: type(value) is str)
_NAME = _Kind("text of one short line", _is_name)
_DATE = _Kind("a date", lambda value: _is_name(value) and len(value) >= 10)
_MODE = _Kind(
    "'inference' or 'training'",
    lambda value: type(value) is str and value in ("inference", "training"),
)
_FLAG = _Kind("true or false", lambda value: type(value) is bool)
_POSITIVE = _Kind("a positive number", lambda value: _is_number(value, _SMALLEST))
_NUMBER = _Kind("a number of at least 0", lambda value: _is_number(value, 0))
_COUNT = _Kind("a whole number of at least 1", lambda value: _is_whole(value, 1))
_NATURAL = _Kind("a whole number of at least 0", lambda value: _is_whole(value, 0))

_TIMES: dict[str, _Spec] = {
    "median": _POSITIVE,
    "p10": _POSITIVE,
    "p90": _POSITIVE,
    "samples": _ListOf(_POSITIVE),
}
_PROVENANCE: dict[str, _Spec] = {
    "date": _DATE,
    "command": _TEXT,
    "commit": _OrNull(_NAME),
    "versions": {"torch": _OrNull(_NAME)},
    "device": {"type": _NAME, "name": _NAME, "driver": _OrMissing(_OrNull(_NAME))},
}
_CASE: dict[str, _Spec] = {
    "model": _NAME,
    "batch": _COUNT,
    "dtype": _NAME,
    "device": _NAME,
    "threads": _NATURAL,
}
_CANDIDATE: dict[str, _Spec] = {
    "name": _NAME,
    "skipped": _OrNull(_TEXT),
    "wrong": _OrNull(_FLAG),
    "latency_ms": _OrNull(_TIMES),
    "images_per_second": _OrNull(_POSITIVE),
    "ratio_to_eager": _OrNull(_POSITIVE),
    "peak_memory_bytes": _OrNull(_NUMBER),
    "kept_bytes": _OrMissing(_OrNull(_NUMBER)),
    "energy_joules": _OrNull(_NUMBER),
    "error": _OrNull(_NUMBER),
    "gradient_error": _OrNull(_NUMBER),
}
MODELS: dict[str, _Spec] = {
    **_PROVENANCE,
    "cases": _ListOf({**_CASE, "mode": _MODE, "candidates": _ListOf(_CANDIDATE)}),
}
_LAYER: dict[str, _Spec] = {
    "label": _NAME,
    "count": _COUNT,
    "bytes": _POSITIVE,
    "flops": _NUMBER,
    "least_microseconds": _POSITIVE,
    "unit_microseconds": _OrMissing(_OrNull(_NUMBER)),
    "candidates": _ListOf(
        {
            "name": _NAME,
            "status": _NAME,
            "reason": _OrNull(_TEXT),
            "error": _OrNull(_NUMBER),
            "keeps_nan": _OrNull(_FLAG),
            "microseconds": _OrNull(_TIMES),
            "gigabytes_per_second": _OrNull(_POSITIVE),
            "teraflops_per_second": _OrNull(_NUMBER),
            "roofline": _OrNull(_POSITIVE),
            "unit_share": _OrMissing(_OrNull(_NUMBER)),
            "ratio_to_eager": _OrNull(_POSITIVE),
        }
    ),
}
KERNELS: dict[str, _Spec] = {
    **_PROVENANCE,
    "cases": _ListOf(
        {
            **_CASE,
            "mode": _OrMissing(_MODE),
            "ceilings": {
                "copy_gigabytes_per_second": _POSITIVE,
                "teraflops_per_second": _POSITIVE,
                "matrix_unit": _OrMissing(
                    _OrNull(
                        {
                            "name": _NAME,
                            "teraops_per_second": {
                                "bfloat16": _POSITIVE,
                                "int8": _OrMissing(_POSITIVE),
                            },
                            "products": _OrNull(_COUNT),
                        }
                    )
                ),
            },
            "layers": _ListOf(_LAYER, empty=True),
            "blocks": _OrMissing(_ListOf(_LAYER, empty=True)),
        }
    ),
}
_STEP = dict.fromkeys(("eager", "compile", "fused", "with_ends"), _POSITIVE)
_PLACE: dict[str, _Spec] = {"gpu": _NAME, "model": _NAME, "dtype": _NAME, "batch": _COUNT}
PREDICTED: dict[str, _Spec] = {
    "networks": _ListOf(
        {
            **_PLACE,
            "microseconds": dict.fromkeys(("eager", "compiled", "fused", "chain"), _POSITIVE),
            "megabytes_per_image": dict.fromkeys(("eager", "fused", "chain"), _POSITIVE),
        }
    ),
    "training": _OrMissing(
        _ListOf(
            {
                **_PLACE,
                "microseconds": dict.fromkeys(
                    ("eager", "compile", "fused", "with_ends"), _POSITIVE
                ),
                "norms": _ListOf(
                    {f"{way}_share_of_copy_bandwidth": _NUMBER for way in ("forward", "backward")}
                ),
            }
        )
    ),
}
RESOURCES: dict[str, _Spec] = {
    "entries": _ListOf(
        {
            "kernel": _NAME,
            "architecture": _NAME,
            "dtype": _NAME,
            **{
                name: _OrMissing(_NUMBER)
                for name in ("registers", "spilled_bytes", "shared_bytes", "occupancy")
            },
        }
    )
}


def error(content: Any, spec: _Spec) -> str | None:
    """What is wrong with a file's content: "cases[0].batch is 0, must be ...", or None.

    Besides what `spec` says: nothing in it may be nested deeper than 32, be no finite number, or
    hold half a surrogate pair, so that it can be written again and printed.
    """
    return _unsound(content) or _error(content, spec, "") or _incomplete(content)


def _unsound(content: Any) -> str | None:
    left: list[tuple[Any, int]] = [(content, 0)]
    while left:
        value, depth = left.pop()
        if depth > _DEEPEST:
            return f"it is nested deeper than {_DEEPEST}"
        if isinstance(value, dict):
            left += ((part, depth + 1) for item in value.items() for part in item)
        elif isinstance(value, list):
            left += ((part, depth + 1) for part in value)
        elif isinstance(value, str):
            if any("\ud800" <= c <= "\udfff" for c in value):
                return "it holds half a surrogate pair"
        elif isinstance(value, float) and not math.isfinite(value):
            return "it holds a number that is not finite"
    return None


def _error(value: Any, spec: _Spec, where: str) -> str | None:
    if isinstance(spec, _OrNull):
        return None if value is None else _error(value, spec.value, where)
    if isinstance(spec, _OrMissing):
        return _error(value, spec.value, where)
    if isinstance(spec, _Kind):
        return None if spec.holds(value) else f"{where} is {_short(value)}, must be {spec.name}"
    if isinstance(spec, _ListOf):
        if not isinstance(value, list) or not (value or spec.empty):
            some = "a list" if spec.empty else "a list with something in it"
            return f"{where} is {_short(value)}, must be {some}"
        items = (_error(item, spec.item, f"{where}[{at}]") for at, item in enumerate(value))
        return next(filter(None, items), None)
    if not isinstance(value, dict):
        return f"{where or 'it'} is {_short(value)}, must be an object"
    for name, field in spec.items():
        inner = f"{where}.{name}" if where else name
        if name in value:
            found = _error(value[name], field, inner)
        elif isinstance(field, _OrMissing):
            continue
        else:
            found = f"{inner} is missing"
        if found is not None:
            return found
    return None


def _incomplete(content: Mapping[str, Any]) -> str | None:
    """What is missing of a candidate that has times, or of one that has neither these nor a why."""
    for at, case in enumerate(content.get("cases", ())):
        for one in case.get("candidates", ()):
            where = f"cases[{at}], {one['name']}"
            if one["latency_ms"] is None:
                if not one["skipped"] and not one["wrong"]:
                    return f"{where}: is neither timed nor skipped nor wrong"
            elif one["images_per_second"] is None or one["ratio_to_eager"] is None:
                return f"{where}: is timed, but has no images_per_second or ratio_to_eager"
        inference = case.get("mode") != "training"
        for layer in [*(case.get("layers") or ()), *(case.get("blocks") or ())]:
            where = f"cases[{at}], {layer['label']}"
            if inference and layer["flops"] < 1:
                return f"{where}: flops is {layer['flops']}, must be at least 1"
            for one in layer["candidates"]:
                if one["microseconds"] is None:
                    continue
                for name in ("gigabytes_per_second", "teraflops_per_second", "roofline"):
                    if one[name] is None or (inference and one[name] < _SMALLEST):
                        return f"{where}, {one['name']}: is timed, but {name} is {one[name]}"
    return None


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)):
        kind = "an object" if isinstance(value, dict) else "a list"
        return f"an empty {kind.split()[1]}" if not value else kind
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
