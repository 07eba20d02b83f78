"""One page about a finished run: how it went, what it cost, and whether its model has the right size.

Everything comes from what the run has left in its folder: TensorBoard's events or CSVLogger's ``metrics.csv``,
``hparams.yaml``, and the ``position.json`` of `ComputeAccounting`. What a run lacks is left out.
"""

from lightning_fedscale.cli.reports.facts import facts
from lightning_fedscale.cli.reports.page import write_page
from lightning_fedscale.cli.reports.run import Run, read_run

__all__ = ["Run", "facts", "read_run", "write_page"]
