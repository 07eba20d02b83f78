"""`ComputeAccounting`: what a run costs, and how far its model is from the best size for that."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from rich.table import Table

from lightning_fedscale import collectives
from lightning_fedscale.devices.batches import form_of
from lightning_fedscale.ledger import Ledger, count_parameters
from lightning_fedscale.metering import Meter
from lightning_fedscale.scaling import (
    Chinchilla,
    Law,
    Position,
    effective_flops,
    law_of,
    position_of,
    sweep_command,
)
from lightning_fedscale.scaling.position import plot
from lightning_fedscale.strategy import FederatedStrategy
from lightning_fedscale.types import RoundRecord

_UNCOUNTED = 0.01
"""Share of memory traffic in operators of unknown cost from which on the count is doubted."""


class ComputeAccounting(Callback):
    """Counts what training costs, and says where the run stands against the best model size for that.

    FLOPs are counted from the module's own training step, once for each form of batch, on tensors without contents; and
    multiplied by what ran: by client under `FederatedStrategy`, with any executor, by step under any other strategy.
    All ranks add up to one ledger, which checkpoints keep, so that nothing is counted twice after an interruption.

    A scaling law makes a position of it: the best size for this compute and so many clients, the loss that the law
    predicts there and here, and one sentence of advice at the end. A law holds for the data it was fitted on.
    ``law="auto"`` takes Chinchilla's for batches of tokens and none otherwise; then counts are reported, and that a law
    of the task's own is to be fitted (`lightning_fedscale.scaling.fit`).

    Args:
        law: "auto", the name of a law, a file of `Fit.save`, a law, or None for counts only.
        rho: what division among clients costs, ``C_eff = C clients**-rho``: 1 counts the average client's compute
            (arXiv 2511.12188), 0 all of it, about 0.24 as DiLoCo. None takes that of the law file, else 1.
        budget: FLOPs that the run is meant to take in all; the position is then that at its end, from now on at the
            present ratio of tokens to FLOPs.
        max_flops: stop training once so many are spent.
        tokens_fn: tokens in a batch, told from shapes; None counts the entries of the first tensor if these are whole
            numbers in two dimensions or more, else samples.

    Attributes:
        ledger: what was spent.
        position: a `Position`, once something was spent and if there is a law; also ``position.json`` in the run's
            directory.

    Raises:
        TypeError, ValueError: for arguments that cannot be.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> accounting = ComputeAccounting()
        >>> trainer = pl.Trainer(max_steps=10, callbacks=[accounting], accelerator="cpu", logger=False,
        ...                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        What the run cost...
        >>> accounting.ledger.training_flops  # 10 x (2 x 32 x 2), forward and again for the gradients of the weights
        2560.0
    """

    def __init__(
        self,
        law: str | Law | None = "auto",
        rho: float | None = None,
        budget: float | None = None,
        max_flops: float | None = None,
        tokens_fn: Callable[[Any], float] | None = None,
    ) -> None:
        self._law, fitted_rho = law_of(law, text=False)
        self._auto = law == "auto"
        self._rho = (1.0 if fitted_rho is None else fitted_rho) if rho is None else rho
        effective_flops(1.0, 1, self._rho)
        for name, value in (("budget", budget), ("max_flops", max_flops)):
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ValueError(f"{name}={value!r}: pass a number of FLOPs above 0, or None.")
        if tokens_fn is not None and not callable(tokens_fn):
            raise TypeError(f"tokens_fn={tokens_fn!r}: pass a function of a batch.")
        self._budget = budget
        self._max_flops = max_flops
        self._tokens_fn = tokens_fn
        self._meter: Meter | None = None
        self._resumed = self._warned = False
        self._begun = 0.0
        self._evaluated = 0.0  # on this rank, since ranks last met
        self.ledger = Ledger()
        self.position: Position | None = None

    @property
    def law(self) -> Law | None:
        """The law in use; None if there is none for this task."""
        return self._law

    @property
    def remaining(self) -> float:
        """FLOPs that are left of ``max_flops``; infinite without."""
        return math.inf if self._max_flops is None else max(0.0, self._max_flops - self.ledger.training_flops)

    # ---- hooks

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have clients metered, if there are any."""
        if trainer.global_step == 0 and not self._resumed:
            self.ledger, self.position = Ledger(), None
        self._resumed = False
        self._meter = Meter(trainer, pl_module, self._tokens_fn)
        if isinstance(trainer.strategy, FederatedStrategy):
            trainer.strategy.meter_clients(self._meter.clients)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A step begins."""
        self._begun = time.perf_counter()

    def on_round_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: RoundRecord) -> None:
        """A round is complete."""
        exchanged = sum(parameter.numel() for parameter in pl_module.parameters())
        self.ledger.add_round(record, count_parameters(pl_module).non_embedding, exchanged)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step, look where the run stands, log it."""
        if not isinstance(trainer.strategy, FederatedStrategy):
            self._count_step(trainer, pl_module, batch)
        if self.remaining == 0.0:
            trainer.should_stop = True
        if trainer._logger_connector.should_update_logs:
            self._choose_law()
            self._locate(trainer, pl_module)
            pl_module.log_dict(self._metrics(pl_module), on_step=True, on_epoch=False, batch_size=1)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Evaluation is counted apart."""
        if self._meter is not None and not trainer.sanity_checking:
            self._evaluated += self._meter.evaluation(form_of(batch))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ranks add up."""
        (total,) = _summed(pl_module.device, self._evaluated)
        self.ledger.flops["evaluation"] += total
        self._evaluated = 0.0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where the run stands."""
        if not self.ledger.tokens:
            return
        self._choose_law()
        self._locate(trainer, pl_module)
        self._check_coverage()
        if trainer.is_global_zero:
            Console().print(self._table(trainer, pl_module))
        if self.position is None:
            if self._auto:
                data: Any = getattr(trainer, "datamodule", None)
                line = sweep_command(
                    _path(pl_module), None if data is None else _path(data), self.ledger.training_flops
                )
                rank_zero_info(
                    "ComputeAccounting: no law for this task yet: fit one. If the module has an argument size, this"
                    f" trains the smallest sweep that can identify a law, and fits it:\n    {line}"
                )
            return
        rank_zero_info(f"ComputeAccounting: {self.position.advice()}.")
        folder = trainer.log_dir  # to be asked on all ranks
        if trainer.is_global_zero and folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.position.save(Path(folder) / "position.json")
        for logger in trainer.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if trainer.is_global_zero and self._law is not None and hasattr(experiment, "add_figure"):
                experiment.add_figure("compute/position", plot(self.position, self._law), trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """The ledger, for the checkpoint."""
        return {"ledger": self.ledger.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from there."""
        self.ledger = Ledger()
        self.ledger.load_state_dict(state_dict["ledger"])
        self._resumed = True

    # ---- parts

    def _count_step(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> None:
        assert self._meter is not None
        cost = self._meter.training(form_of(batch))
        steps = trainer.fit_loop.epoch_loop._should_accumulate()
        flops, optimizer, samples, tokens = _summed(
            module.device, cost.flops, 0.0 if steps else cost.optimizer, cost.samples, cost.tokens
        )
        params, seconds = count_parameters(module).non_embedding, time.perf_counter() - self._begun
        self.ledger.add_step(
            flops=flops, optimizer=optimizer, samples=samples, tokens=tokens, params=params, seconds=seconds
        )

    def _choose_law(self) -> None:
        assert self._meter is not None
        if self._auto and self._law is None and self._meter.counts_text:
            self._law = Chinchilla()

    def _locate(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        flops, tokens = self.ledger.training_flops, self.ledger.tokens
        if self._law is None or not flops:
            return
        share = 1.0 if self._budget is None else self._budget / flops
        try:
            self.position = position_of(
                self._law, params=self.ledger.average_params, tokens=tokens * share, flops=flops * share,
                clients=_clients(trainer), rho=self._rho,
            )  # fmt: skip
        except ValueError as error:
            self.position = None
            if not self._warned:
                rank_zero_warn(f"ComputeAccounting: no position under {self._law.name}: {error}")
            self._warned = True

    def _metrics(self, module: pl.LightningModule) -> dict[str, float]:
        ledger, counts = self.ledger, count_parameters(module)
        values = {
            "compute/flops_total": ledger.training_flops,
            "compute/flops_per_client": ledger.training_flops / _clients(module.trainer),
            "compute/flops_evaluation": ledger.flops["evaluation"],
            "compute/flops_aggregation": ledger.flops["aggregation"],
            "compute/tokens": ledger.tokens,
            "compute/params": float(counts.non_embedding),
        }
        if self._budget is not None or self._max_flops is not None:
            values["compute/budget_used"] = ledger.training_flops / (self._max_flops or self._budget or math.nan)
        if (position := self.position) is not None:
            values |= {
                "compute/optimal_params": position.optimal_params,
                "compute/optimal_params_low": position.low,
                "compute/optimal_params_high": position.high,
                "compute/size_ratio": position.size_ratio,
                "compute/predicted_loss": position.predicted_loss,
                "compute/optimal_loss": position.optimal_loss,
                "compute/excess_loss": position.excess_loss,
            }
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def _check_coverage(self) -> None:
        assert self._meter is not None
        if (share := self._meter.uncounted) > _UNCOUNTED:
            names = ", ".join(name for name, _ in self._meter.unknown.most_common(5))
            rank_zero_warn(
                f"ComputeAccounting: operators whose FLOPs are not known ({names}) make {share:.0%} of the memory"
                " traffic: the count is too low."
            )

    def _table(self, trainer: pl.Trainer, module: pl.LightningModule) -> Table:
        ledger, counts = self.ledger, count_parameters(module)
        table = Table(title="What the run cost", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        rows = [
            ("Parameters, trained and not embedding", f"{counts.non_embedding:,}"),
            ("Training FLOPs", f"{ledger.training_flops:.3e}"),
            ("  per client", f"{ledger.training_flops / _clients(trainer):.3e}"),
            ("  against 6 x parameters x tokens", f"{ledger.training_flops / (6 * ledger.size_tokens):.2f}"),
            ("Evaluation FLOPs", f"{ledger.flops['evaluation']:.3e}"),
            ("Tokens or samples", f"{ledger.tokens:,.0f}"),
            ("Seconds", f"{ledger.seconds:,.1f}"),
        ]
        if ledger.upload_bytes:
            rows.append(("Bytes up and down", f"{ledger.upload_bytes:,.0f} and {ledger.download_bytes:,.0f}"))
        if (position := self.position) is not None:
            rows += [
                (f"Best size under {position.law}", f"{position.optimal_params:,.0f}"),
                ("  within 1 % of its loss", f"{position.low:,.0f} to {position.high:,.0f}"),
                ("Predicted loss", f"{position.predicted_loss:.4g}"),
                ("  of the best size", f"{position.optimal_loss:.4g}"),
            ]
        for row in rows:
            table.add_row(*row)
        return table


def _path(what: object) -> str:
    return f"{type(what).__module__}.{type(what).__qualname__}"


def _clients(trainer: pl.Trainer) -> int:
    strategy = trainer.strategy
    number = strategy.num_clients if isinstance(strategy, FederatedStrategy) else None
    return 1 if number is None else number


def _summed(device: torch.device, *numbers: float) -> list[float]:
    """The sums over all ranks."""
    if collectives.world_size() == 1:
        return [float(number) for number in numbers]
    found: list[float] = collectives.sum_over_ranks(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()
    return found
