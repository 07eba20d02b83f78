"""One page about a finished run: its curves, its costs, and whether its model has the right size.

All data comes from the run's folder: TensorBoard's events or CSVLogger's ``metrics.csv``, ``hparams.yaml``, and the
``position.json`` of `ComputeAccounting`. Sections without data are left out.
"""

from lightning_fedscale.cli.run_page.facts import facts
from lightning_fedscale.cli.run_page.page import write_page
from lightning_fedscale.cli.run_page.run import Run, read_run

__all__ = ["Run", "facts", "read_run", "write_page"]
