"""Least squares row by row in plain Python, which is faster than matrices for the few columns of a detector."""

from __future__ import annotations

from collections.abc import Sequence

_NOTHING = 1e-9
"""Largest residual that rounding causes in a column that depends linearly on others."""


def empty_triangle(columns: int) -> list[float]:
    """Return the regression on this many columns before the first row."""
    return [0.0] * (columns * (columns + 3) // 2)


def take_row(triangle: Sequence[float], given: Sequence[float], value: float) -> tuple[float, float, list[float]]:
    """Return weight and deviation of a value from its prediction by the earlier rows, and the updated regression.

    The deviation times the root of the weight is the recursive residual (Brown, Durbin and Evans 1975, J. R. Stat. Soc.
    B 37), whose spread is that of the values' own noise. While the rows do not determine the prediction, the weight is
    zero. The rotations without square roots (Gentleman 1974, Applied Statistics 23, AS 75) form no products of columns,
    so that small deviations keep their digits, and they allow columns that depend on others.

    Args:
        triangle: the regression: for each column its residual square given the columns before it, then the coefficients
            of the later columns and of the value on it.
        given: the row of regressors.
        value: the number that is regressed.

    Example:
        >>> triangle = empty_triangle(2)
        >>> for x, y in [(0.0, 1.0), (1.0, 3.0), (2.0, 6.0)]:
        ...     weight, deviation, triangle = take_row(triangle, [1.0, x], y)
        ...     print(round(weight, 3), round(deviation, 3))  # at last 5 was expected
        0.0 1.0
        0.0 2.0
        0.167 1.0
    """
    triangle, row, weight, start = [*triangle], [*given, value], 1.0, 0
    for column, width in enumerate(range(len(given), 0, -1)):
        x = row[column]
        if weight > 0 and abs(x) > _NOTHING:
            square = triangle[start] + weight * x * x
            keep, gain = triangle[start] / square, weight * x / square
            triangle[start] = square
            weight *= keep
            for step in range(1, width + 1):
                old, new = triangle[start + step], row[column + step]
                row[column + step] = new - x * old
                triangle[start + step] = keep * old + gain * new
        start += width + 1
    return weight, row[-1], triangle


def predicted(triangle: Sequence[float], given: Sequence[float]) -> float:
    """Return the regression's prediction for a row.

    Example:
        >>> triangle = empty_triangle(2)
        >>> for x, y in [(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]:
        ...     _, _, triangle = take_row(triangle, [1.0, x], y)
        >>> predicted(triangle, [1.0, 10.0])
        21.0
    """
    row, start, total = [*given], 0, 0.0
    for column, width in enumerate(range(len(given), 0, -1)):
        x = row[column]
        for step in range(1, width):
            row[column + step] -= x * triangle[start + step]
        total += x * triangle[start + width]
        start += width + 1
    return total
