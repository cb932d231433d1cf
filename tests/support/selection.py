"""Which of many cases run without `--whole`: some that are, between them, of every kind."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeVar

import pytest

Case = TypeVar("Case", bound=Hashable)


def covering(kinds: Mapping[Case, Iterable[Hashable]]) -> list[Case]:
    """Few of the cases that are of every kind that any of them is of.

    The next one is always of most kinds that none before it is of. Of several such it is one whose
    kinds have come least often, and then the first. What a few values of several parameters make
    comes to about as many cases as the longest list of values has, and the others take turns.
    """
    left = {case: set(of) for case, of in kinds.items()}
    missing = set().union(*left.values())
    times: Counter[Hashable] = Counter()
    chosen = []
    while missing:
        case = max(
            left, key=lambda one: (len(left[one] & missing), -sum(times[k] for k in left[one]))
        )
        times.update(left[case])
        missing -= left.pop(case)
        chosen.append(case)
    return chosen


def examples(count: int) -> int:
    """How many examples hypothesis draws: `count` with `--whole`, else a quarter of them."""
    return count if os.environ.get("FUSED_RESNET_WHOLE_SUITE") else max(count // 4, 10)


def one_of_each(cases: Iterable[Any], *kinds: Callable[..., Hashable]) -> list[Any]:
    """`cases` as parameters, those marked `whole` that are only of kinds that others are of too.

    Args:
        cases: values of a parameter, tuples of several, or `pytest.param` of either.
        kinds: what a case is in some respect, as a function of its values: they are kinds of
            `test_exact`'s cases that a case has a tile and that it is a problem.
    """
    parameters = [
        case if hasattr(case, "marks") else pytest.param(*(case if type(case) is tuple else [case]))
        for case in cases
    ]
    of = {
        i: {(k, kind(*one.values)) for k, kind in enumerate(kinds)}
        for i, one in enumerate(parameters)
    }
    chosen = set(covering(of))
    return [
        one
        if i in chosen
        else pytest.param(*one.values, id=one.id, marks=[*one.marks, pytest.mark.whole])
        for i, one in enumerate(parameters)
    ]
