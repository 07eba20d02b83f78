"""Draw the position that README.md shows: ``python docs/position.py`` writes docs/pictures/position.png."""

from __future__ import annotations

from pathlib import Path

from lightning_fedscale.scaling import Chinchilla, position_of
from lightning_fedscale.scaling.position import plot

PICTURE = Path(__file__).resolve().parent / "pictures" / "position.png"
LAW = Chinchilla()
POSITION = position_of(LAW, params=1e9, tokens=1e20 / 6e9, flops=1e20, clients=10, rho=1.0)
"""The position of a language model of 1 B parameters that ten clients train with 1e20 FLOPs."""


def main() -> None:
    """Draw the figure."""
    figure = plot(POSITION, LAW)
    figure.axes[0].set_title("1 B parameters, 1e20 FLOPs, 10 clients (Chinchilla, rho 1)")
    figure.savefig(PICTURE, dpi=100, metadata={"Description": POSITION.sentences()})  # so that a test sees an old one


if __name__ == "__main__":
    main()
