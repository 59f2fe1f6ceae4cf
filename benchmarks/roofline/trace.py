"""Counts what a variant's Triton functions compute, by running them on shapes.

A `triton.jit` function is Python whose only operations on tensors are those of `triton.language`.
Here it is called with `Traced` values, which have a shape and nothing else, and with `Language` in
place of `triton.language`; every operation is added to a `Tally`. So a new variant is counted
without an entry anywhere, unless it uses an operation that is not below: `UncountedError` names it.
"""

from __future__ import annotations

import builtins
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import triton.language as tl


class UncountedError(Exception):
    """What cannot be counted, in one line."""


@dataclass
class Tally:
    """Operations on single elements.

    Attributes:
        scalar: instructions of the floating-point and integer units; a product that is added to
            something is one of them (FMA), a sign or an absolute value none.
        special: exponentials, logarithms, roots and reciprocals.
    """

    scalar: int = 0
    special: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.scalar + other.scalar, self.special + other.special)

    def __mul__(self, times: int) -> Tally:
        return Tally(self.scalar * times, self.special * times)


class Traced:
    """A tensor of which only the shape is known.

    Args:
        tally: where its operations are added.
        shape: of the tensor.
        product: it is the result of a multiplication that has been counted.
    """

    def __init__(self, tally: Tally, shape: Sequence[int], product: bool = False) -> None:
        self.tally, self.shape, self.product = tally, tuple(shape), product

    def _with(self, other: Any, special: bool = False) -> Traced:
        """The result of an operation with `other`, counted once an element."""
        shape = broadcast(self.shape, getattr(other, "shape", ()))
        if special:
            self.tally.special += math.prod(shape)
        else:
            self.tally.scalar += math.prod(shape)
        return Traced(self.tally, shape)

    def _sum(self, other: Any) -> Traced:
        if self.product or getattr(other, "product", False):  # the product's FMA does it
            return Traced(self.tally, broadcast(self.shape, getattr(other, "shape", ())))
        return self._with(other)

    def __mul__(self, other: Any) -> Traced:
        result = self._with(other)
        result.product = True
        return result

    def __truediv__(self, other: Any) -> Traced:
        self._with(other, special=True)  # the reciprocal
        return self * other

    def __rtruediv__(self, other: Any) -> Traced:
        return self._with(other, special=True)

    def __neg__(self) -> Traced:
        return Traced(self.tally, self.shape)

    def __getitem__(self, key: Any) -> Traced:
        shape, sizes = [], iter(self.shape)
        for part in key:
            shape.append(1 if part is None else next(sizes))
        return Traced(self.tally, shape, self.product)

    def to(self, dtype: Any) -> Traced:
        """A conversion."""
        return self._with(None)

    __add__ = __radd__ = __sub__ = __rsub__ = _sum
    __rmul__ = __mul__
    __lt__ = __le__ = __gt__ = __ge__ = __and__ = __rand__ = __or__ = __ror__ = _with
    # A comparison is another value, as Triton's are, and not a bool; so there is no hash either.
    __eq__ = __ne__ = _with  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


def broadcast(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """The shape of an operation's result."""
    length = max(len(a), len(b))
    pairs = zip((1,) * (length - len(a)) + tuple(a), (1,) * (length - len(b)) + tuple(b),
                strict=True)  # fmt: skip
    return tuple(max(pair) for pair in pairs)


class Language:
    """`triton.language` for traced values.

    Args:
        function: whose operations these are, for errors.
    """

    float32 = "float32"

    def __init__(self, function: str) -> None:
        self._function = function

    def __getattr__(self, name: str) -> Any:
        raise UncountedError(
            f"{self._function}() uses tl.{name}: add it to Language in benchmarks/roofline/trace.py"
        )

    def _special(self, x: Traced) -> Traced:
        return x._with(None, special=True)

    exp2 = log2 = sqrt = rsqrt = _special

    def exp(self, x: Traced) -> Traced:
        """2 to the power of a multiple."""
        return self._special(x * 1.0)

    log = exp

    def abs(self, x: Traced) -> Traced:
        """A modifier of the next instruction's operand."""
        return -x

    def maximum(self, x: Any, y: Any) -> Traced:
        """One of the two is a tensor."""
        return x._with(y) if isinstance(x, Traced) else y._with(x)

    minimum = maximum

    def where(self, condition: Traced, x: Any, y: Any) -> Traced:
        """A selection."""
        shape = broadcast(getattr(x, "shape", ()), getattr(y, "shape", ()))
        return condition._with(Traced(condition.tally, shape))

    def sum(self, x: Traced, axis: int) -> Traced:
        """One operation an element."""
        x._sum(None)
        return Traced(x.tally, x.shape[:axis] + x.shape[axis + 1 :])

    def max(self, x: Traced, axis: int) -> Traced:
        """One operation an element."""
        x._with(None)
        return Traced(x.tally, x.shape[:axis] + x.shape[axis + 1 :])

    def cumsum(self, x: Traced, axis: int) -> Traced:
        """At least one operation an element."""
        return x._with(None)

    def zeros_like(self, x: Traced) -> Traced:
        """No operation."""
        return Traced(x.tally, x.shape)


def traceable(function: Any) -> Callable[..., Any]:
    """A `triton.jit` function that takes traced values: the same code with another `tl`."""
    raw = getattr(function, "fn", function)
    scope: dict[str, Any] = {"__builtins__": builtins}
    for name in raw.__code__.co_names:
        value = raw.__globals__.get(name)
        if value is tl:
            scope[name] = Language(raw.__name__)
        elif isinstance(value, tl.constexpr):
            scope[name] = value.value
        elif hasattr(value, "fn"):
            scope[name] = traceable(value)
        elif name in raw.__globals__:
            scope[name] = value
    return types.FunctionType(raw.__code__, scope, raw.__name__, raw.__defaults__)
