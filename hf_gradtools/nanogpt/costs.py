"""Counts of arithmetic operations, by kind.

Conventions: a multiply-accumulate of a matrix product is one `mac` and nothing else; a sum of n numbers is n `add`s
(the first adds to zero); a maximum over n numbers is n `max`; a division by a constant is a `mul`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Ops:
    """How many operations of each kind, as exact integers.

    Args:
        mac: multiply-accumulates of matrix products and convolutions.
        mul: other multiplications.
        add: other additions and subtractions.
        exp: exponentials, of any base.
        div: divisions by something computed.
        sqrt: square roots.
        max: comparisons that keep the larger, in a row's maximum or a ReLU.
        tanh: hyperbolic tangents.
        erf: error functions.
        log: logarithms.
    """

    mac: int = 0
    mul: int = 0
    add: int = 0
    exp: int = 0
    div: int = 0
    sqrt: int = 0
    max: int = 0
    tanh: int = 0
    erf: int = 0
    log: int = 0

    def __add__(self, other: Ops) -> Ops:
        return Ops(**{name: getattr(self, name) + getattr(other, name) for name in KINDS_OF_OPS})

    def __radd__(self, other: Any) -> Ops:
        return self if other == 0 else NotImplemented  # for sum()

    def __mul__(self, times: int) -> Ops:
        return Ops(**{name: getattr(self, name) * times for name in KINDS_OF_OPS})

    __rmul__ = __mul__


KINDS_OF_OPS = tuple(field.name for field in fields(Ops))
