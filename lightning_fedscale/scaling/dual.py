"""Numbers that carry their derivatives, so that a fit has exact gradients of a formula that is written once."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]


class Dual:
    """Values with their derivatives by several unknowns (forward-mode differentiation).

    Args:
        value: numbers.
        slope: derivatives, one row per unknown, broadcast against ``value``.

    Example:
        >>> x = Dual(np.array([2.0]), np.array([[1.0]]))
        >>> y = 3.0 / x**2 + exp(x)
        >>> bool(np.isclose(y.slope[0, 0], -6.0 / 2.0**3 + np.exp(2.0)))
        True
    """

    __array_ufunc__ = None  # numpy then calls the reflected operators of this class

    def __init__(self, value: Any, slope: FloatArray) -> None:
        self.value = np.asarray(value, dtype=np.float64)
        self.slope = slope

    def __add__(self, other: Any) -> Dual:
        if isinstance(other, Dual):
            return Dual(self.value + other.value, self.slope + other.slope)
        return Dual(self.value + other, self.slope + 0.0 * np.asarray(other))

    def __mul__(self, other: Any) -> Dual:
        if isinstance(other, Dual):
            return Dual(self.value * other.value, self.slope * other.value + other.slope * self.value)
        return Dual(self.value * other, self.slope * other)

    def __pow__(self, other: Any) -> Dual:
        if isinstance(other, Dual):
            found: Dual = exp(other * log(self))
            return found
        return Dual(self.value**other, self.slope * (other * self.value ** (other - 1.0)))

    def __rpow__(self, other: Any) -> Dual:
        found: Dual = exp(self * np.log(other))
        return found

    def __neg__(self) -> Dual:
        return Dual(-self.value, -self.slope)

    def __sub__(self, other: Any) -> Dual:
        return self.__add__(-other)

    def __rsub__(self, other: Any) -> Dual:
        return (-self).__add__(other)

    def __truediv__(self, other: Any) -> Dual:
        return self.__mul__(other**-1.0 if isinstance(other, Dual) else 1.0 / np.asarray(other))

    def __rtruediv__(self, other: Any) -> Dual:
        return self.__pow__(-1.0).__mul__(other)

    __radd__, __rmul__ = __add__, __mul__


def exp(x: Any) -> Any:
    """Compute the exponential of a number, an array or a `Dual`."""
    if not isinstance(x, Dual):
        return np.exp(x)
    value = np.exp(x.value)
    return Dual(value, x.slope * value)


def log(x: Any) -> Any:
    """Compute the logarithm of a number, an array or a `Dual`."""
    return Dual(np.log(x.value), x.slope / x.value) if isinstance(x, Dual) else np.log(x)


def where(condition: Any, x: Any, y: Any) -> Any:
    """Choose between numbers, arrays or `Dual` by a condition that does not depend on the unknowns."""
    chosen = np.where(condition, value_of(x), value_of(y))
    if not isinstance(x, Dual) and not isinstance(y, Dual):
        return chosen
    return Dual(chosen, np.where(condition, _slope_of(x), _slope_of(y)))


def value_of(x: Any) -> Any:
    """Return the value without derivatives."""
    return x.value if isinstance(x, Dual) else x


def _slope_of(x: Any) -> Any:
    return x.slope if isinstance(x, Dual) else 0.0
