"""The training data divided among clients, and what each of them has to do in a round."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_fedscale import randomness
from lightning_fedscale.arguments import Arguments, name_clients
from lightning_fedscale.executors import ClientLoader
from lightning_fedscale.rounds import LocalWork, RoundPlan, epochs_from, pass_order, plan_round, steps_from
from lightning_fedscale.types import Cursor, IntArray


class Workload:
    """Divides the user's train loader among the clients and says who does what in a round.

    Args:
        module: the user's module; BatchNorm in it decides how tail batches of one sample are treated.
        loader: the user's train loader.
        options: the strategy's checked arguments.
        world_size: number of ranks, each of which needs a client in every round.
        share: share or number of each client's batches to use.
        device: where clients train.
        show_progress: whether long work shows a bar.

    Raises:
        TypeError, ValueError: for data that cannot be divided as asked; names what is wrong and the remedy.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        loader: object,
        options: Arguments,
        world_size: int,
        share: float | int,
        *,
        device: torch.device,
        show_progress: bool,
    ) -> None:
        batch_norm = any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) for part in module.modules())
        self.loader = ClientLoader(loader, share=share, merge_single=batch_norm)
        self.partition = options.partition(self.loader.dataset)
        self._options = options
        self._world_size = world_size
        self._cohort_size = options.cohort_size(self.partition.num_clients)
        salt = self.loader.salt
        self._seed = options.seed if salt is None else randomness.derive(options.seed, randomness.ORDER, salt)
        self._check(batch_norm)
        self.loader.keep_on(device, options.cache_dataset, seed=options.seed, show_progress=show_progress)
        sizes = self.partition.sizes
        rank_zero_info(
            f"Federated: {len(sizes):,} clients hold {int(sizes.sum()):,} samples ({sizes.min():,} to {sizes.max():,}"
            f" each); {self._cohort_size:,} of them train in every round."
        )

    def _check(self, batch_norm: bool) -> None:
        sizes, cohort_size = self.partition.sizes, self._cohort_size
        if cohort_size < self._world_size:
            raise ValueError(
                f"clients_per_round={cohort_size} is fewer than the {self._world_size} ranks (devices x nodes): every"
                f" rank needs a client. Use devices={cohort_size} or raise clients_per_round."
            )
        if len(short := self.loader.too_small(sizes)):
            raise ValueError(
                f"train_dataloader: drop_last=True with batch_size={self.loader.batch_size} leaves {len(short)} of"
                f" {len(sizes)} clients without a batch ({name_clients(short)}): set drop_last=False, use a smaller"
                " batch_size, or a partitioner with a larger min_partition_size."
            )
        if batch_norm and len(alone := (sizes == 1).nonzero()[0]):
            rank_zero_warn(
                f"{len(alone)} clients hold a single sample ({name_clients(alone)}), and the model has BatchNorm, which"
                " may refuse a batch of one: use a partitioner with min_partition_size=2."
            )

    def plan(self, round: int) -> RoundPlan:
        """The cohort of a round and where each client trains."""
        return plan_round(
            round,
            seed=self._options.seed,
            sampler=self._options.sampler,
            num_clients=self.partition.num_clients,
            clients_per_round=self._cohort_size,
            cost=self._cost,
            world_size=self._world_size,
        )

    def _cost(self, clients: IntArray) -> IntArray:
        # By samples; with local_steps every client does the same work. Not `partition.sizes`: that is of all clients.
        offsets = self.partition.offsets
        sizes: IntArray = offsets[clients + 1] - offsets[clients]
        return sizes if self._options.local_steps is None else sizes * 0 + self._options.local_steps

    def of_client(self, client: int, round: int, cursor: Cursor) -> LocalWork:
        """What a client does in a round.

        Args:
            client: index of the client.
            round: index of the round.
            cursor: where its data goes on; counts with ``local_steps`` only.
        """
        indices, options = self.partition.client(client), self._options

        def batches_of(number: int) -> list[list[int]]:
            shuffle = self.loader.shuffle
            return self.loader.batches(
                pass_order(indices, shuffle=shuffle, seed=self._seed, client=client, number=number)
            )

        if options.local_steps is not None:
            batches, cursor = steps_from(cursor, options.local_steps, batches_of)
        else:
            assert options.local_epochs is not None
            batches, cursor = epochs_from(round * options.local_epochs, options.local_epochs, batches_of), (0, 0)
        return LocalWork(client, len(indices), batches, cursor, (options.seed, round))
