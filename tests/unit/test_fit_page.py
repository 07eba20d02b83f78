"""The picture of a fit can be read, whatever the losses are."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from lightning_fedscale.scaling import fit
from lightning_fedscale.scaling.fit_page import plot_fit


@pytest.mark.parametrize("falls", [0.1, 3.0, 300.0])
def test_labels_are_whole_and_apart(falls: float) -> None:
    params = np.repeat(np.geomspace(300, 5000, 6), 4)
    tokens = np.tile(np.geomspace(1e4, 1e5, 4), 6)
    losses = 2.0 + falls * (100 / params + 3000 / tokens)
    figure = plot_fit(fit({"params": params, "tokens": tokens, "loss": losses}, bootstrap=0, holdout=False))
    figure.draw_without_rendering()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)
            labels = [label.get_window_extent() for label, at in ticks if low <= at <= high and label.get_text()]
            assert len(labels) >= 1
            assert not any(one.overlaps(other) for one, other in combinations(labels, 2))
            for box in [*labels, axis.label.get_window_extent()]:
                assert all(map(figure.bbox.containsx, (box.x0, box.x1)))
                assert all(map(figure.bbox.containsy, (box.y0, box.y1)))
            assert all(not label.overlaps(axis.label.get_window_extent()) for label in labels)
