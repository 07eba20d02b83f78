"""The training data divided among clients, and the work of each client in a round."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_fedscale.core.executors import ClientLoader
from lightning_fedscale.core.options.options import Options, name_clients
from lightning_fedscale.core.plan import (
    LocalWork,
    RoundPlan,
    Simulated,
    empty_simulation,
    epochs_from,
    pass_order,
    place_longest_first,
    plan_round,
    sampled,
    steps_from,
)
from lightning_fedscale.devices.fleet import ClientWorkload, Fleet
from lightning_fedscale.server.asynchrony import AsyncSimulation, FedBuff
from lightning_fedscale.types import Cohort, Cursor, FloatArray, IntArray
from lightning_fedscale.utils import randomness


class ClientData:
    """Divides the user's train loader among the clients and says who does what in a round.

    Args:
        module: the user's module; BatchNorm in it decides how tail batches of one sample are treated.
        loader: the user's train loader.
        options: the strategy's checked arguments.
        world_size: number of ranks, each of which needs a client in every round.
        share: share or number of each client's batches to use.
        device: where clients train.
        show_progress: whether long work shows a bar.

    Attributes:
        fleet: the clients' simulated hardware, once it is known; decides their batch sizes and who comes in time.

    Raises:
        TypeError, ValueError: for data that cannot be divided as requested; names the problem and the remedy.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        loader: object,
        options: Options,
        world_size: int,
        share: float | int,
        *,
        device: torch.device,
        show_progress: bool,
    ) -> None:
        batch_norm = any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) for part in module.modules())
        self.loader = ClientLoader(loader, share=share, merge_single=batch_norm)
        self.partition = options.partition(self.loader.dataset)
        self.fleet: Fleet | None = None
        self._passes: dict[tuple[int, int], tuple[int, int]] = {}
        self._simulation: AsyncSimulation | None = None
        self._options = options
        self._world_size = world_size
        self.cohort_size = options.cohort_size(self.partition.num_clients)
        salt = self.loader.salt
        self._seed = options.seed if salt is None else randomness.derive(options.seed, randomness.ORDER, salt)
        self._check(batch_norm)
        self.loader.keep_on(device, options.cache_dataset, seed=options.seed, show_progress=show_progress)
        sizes = self.partition.sizes
        rank_zero_info(
            f"Federated: {len(sizes):,} clients hold {int(sizes.sum()):,} samples ({sizes.min():,} to {sizes.max():,}"
            f" each); {self.cohort_size:,} of them train in every round."
        )

    def _check(self, batch_norm: bool) -> None:
        sizes, cohort_size = self.partition.sizes, self.cohort_size
        self._check_population()
        self._check_asynchrony()
        if cohort_size < self._world_size:
            raise ValueError(
                f"clients_per_round={cohort_size}: each of the {self._world_size} ranks (devices x nodes) needs a"
                f" client: pass Trainer(devices={cohort_size}) or more clients_per_round."
            )
        if len(short := self.loader.too_small(sizes)):
            raise ValueError(
                f"train_dataloader: drop_last=True with batch_size={self.loader.batch_size} leaves {len(short)} of"
                f" {len(sizes)} clients without a batch ({name_clients(short)}): set drop_last=False, use a smaller"
                " batch_size, or a partitioner with a larger min_partition_size."
            )
        if batch_norm and len(alone := (sizes == 1).nonzero()[0]):
            rank_zero_warn(
                f"partitioner: {len(alone)} client(s) have only one sample ({name_clients(alone)}), and BatchNorm may"
                " fail on a batch of one: pass a partitioner with min_partition_size=2."
            )

    def _check_population(self) -> None:
        population = self._options.population
        if population is None:
            return
        if self.loader.has_custom_batches and population.batch_size != "loader":
            raise ValueError(
                f"population: batch_size={population.batch_size!r} has no effect on a loader with a custom"
                " batch_sampler: pass Population(..., batch_size='loader') or a DataLoader with a batch_size."
            )
        if population.batch_size == "fastest" and callable(self._options.local_steps):
            raise ValueError(
                "population: batch_size='fastest' needs a fixed number of local steps, and"
                f" local_steps={self._options.local_steps!r}: pass local_steps as a number, or another batch_size."
            )
        if population.may_drop and population.min_clients < self._world_size:
            raise ValueError(
                f"population: min_clients={population.min_clients} may leave some of the {self._world_size} ranks"
                f" (devices x nodes) without a client: pass Population(..., min_clients={self._world_size}) or fewer"
                " devices."
            )

    def workload(self, model_bytes: int, update_bytes: int) -> ClientWorkload:
        """Return the work of the clients in a round, from which their hardware is simulated."""
        options, sizes = self._options, self.partition.sizes
        per_pass = float(sizes.mean()) / self.loader.batch_size
        steps = options.steps_in(0) or (options.local_epochs or 1) * per_pass
        # Where tails are dropped, a larger batch would leave the smallest client without any.
        most = int(sizes.min() if self.loader.drop_last else sizes.max())
        steps *= options.algorithm.passes
        return ClientWorkload(self.cohort_size, steps, self.loader.batch_size, most, model_bytes, update_bytes)

    def plan(self, round: int, losses: Mapping[int, float]) -> RoundPlan:
        """Return the cohort of a round and the rank of each client, given the clients' last known losses."""
        steps = self._options.steps_in(round)
        if self._options.asynchrony is not None:
            return self._plan_buffered(self._options.asynchrony, round, steps)
        to_sample, simulate = self._clients_to_sample(), None
        if (fleet := self.fleet) is not None:
            simulate = partial(self._simulate, fleet, round, steps)
        plan = plan_round(
            round,
            seed=self._options.seed,
            sampler=self._options.sampler,
            num_clients=self.partition.num_clients,
            clients_per_round=to_sample,
            cost=partial(self._cost, steps),
            world_size=self._world_size,
            simulate=simulate,
            losses=losses,
        )
        return self._enough(plan)._replace(local_steps=steps)

    def _clients_to_sample(self) -> int:
        population, clients = self._options.population, self.partition.num_clients
        return self.cohort_size if population is None else population.asked(self.cohort_size, clients)

    def _enough(self, plan: RoundPlan) -> RoundPlan:
        """Return the plan, or that of an empty round if it has fewer clients than the aggregator needs."""
        rule, clients = self._options.algorithm.aggregator, len(plan.cohort)
        if clients == 0 or clients >= rule.needs:
            return plan
        rank_zero_warn(
            f"round {plan.round}: aggregator={rule.call} needs at least {rule.needs} clients, but only {clients} can"
            " take part, so no client trains in this round."
        )
        simulated = None if plan.simulated is None else empty_simulation()
        return plan._replace(cohort=plan.cohort[:0], ranks=plan.ranks[:0], simulated=simulated)

    def check_cohorts(self, rounds: Iterable[int]) -> None:
        """Refuse an aggregator that needs more clients than any of these rounds has.

        Raises:
            ValueError: the message names the aggregator, the number and the remedy.
        """
        options, count = self._options, self.partition.num_clients
        rule, largest, at = options.algorithm.aggregator, 0, 0
        for round in rounds if rule.needs else ():
            clients = self.cohort_size
            if options.asynchrony is None:
                clients = len(sampled(options.sampler, options.seed, round, count, self._clients_to_sample()))
            if clients >= rule.needs:
                return
            if clients > largest:
                largest, at = clients, round
        if largest:
            rule.init(torch.zeros(0, dtype=torch.float64), Cohort(at, np.arange(largest), count, 0, options.seed))

    def _plan_buffered(self, asynchrony: FedBuff, round: int, local_steps: int | None) -> RoundPlan:
        if self._simulation is None:
            count, options, fleet = self.partition.num_clients, self._options, self.fleet
            concurrency = asynchrony.concurrent(self.cohort_size, count)
            available = (lambda start, client: True) if fleet is None else partial(fleet.is_available, options.seed)
            self._simulation = AsyncSimulation(
                options.seed, count, self.cohort_size, concurrency, partial(self._seconds, asynchrony), available
            )
        buffered = self._simulation.of_round(round)
        ranks = place_longest_first(self._cost(local_steps, buffered.clients), self._world_size)
        return RoundPlan(round, buffered.clients, ranks, local_steps=local_steps, buffered=buffered)

    def _seconds(self, asynchrony: FedBuff, client: int, version: int) -> float:
        if asynchrony.seconds is not None:
            return float(asynchrony.seconds[client])
        assert self.fleet is not None
        clients = np.array([client])
        steps, samples = self._amounts(self.fleet, self._options.steps_in(version), clients)
        return float(self.fleet.seconds(clients, steps, samples)[0])

    def _check_asynchrony(self) -> None:
        asynchrony, count = self._options.asynchrony, self.partition.num_clients
        if asynchrony is None:
            return
        asynchrony.concurrent(self.cohort_size, count)
        population = self._options.population
        if asynchrony.seconds is None and population is None:
            raise ValueError(
                "mode='async': the time that each client takes is unknown: pass population=Population(...), or"
                " mode=FedBuff(seconds=[...]) with one number for each client."
            )
        if asynchrony.seconds is not None and len(asynchrony.seconds) != count:
            raise ValueError(
                f"seconds: {len(asynchrony.seconds)} number(s) were given for {count} clients: pass one for each."
            )
        if population is not None and (population.deadline is not None or population.over_selection > 1):
            raise ValueError(
                "population: deadline and over_selection have no meaning with mode='async', where rounds do not wait"
                " for clients: leave them out."
            )

    def _simulate(self, fleet: Fleet, round: int, local_steps: int | None, clients: IntArray) -> Simulated:
        steps, samples = self._amounts(fleet, local_steps, clients)
        selection = fleet.select(self._options.seed, round, clients, steps, samples, self.cohort_size)
        return Simulated(selection, fleet.batch_sizes_of(selection.clients))

    def _amounts(self, fleet: Fleet, local_steps: int | None, clients: IntArray) -> tuple[FloatArray, FloatArray]:
        """Return the number of batches of each client in a round, and the samples in all of them."""
        times = self._options.algorithm.passes
        passes = [self._pass(int(size), fleet.batch_size(client)) for client, size in self._sized(clients)]
        steps, samples = np.array(passes, dtype=np.float64).T
        if local_steps is not None:
            # The place in its data from which a client resumes is ignored here: full and last batches count on average.
            return np.full(len(passes), float(local_steps * times)), samples / steps * local_steps * times
        assert self._options.local_epochs is not None
        times *= self._options.local_epochs
        return steps * times, samples * times

    def _pass(self, num_samples: int, batch_size: int) -> tuple[int, int]:
        if (num_samples, batch_size) not in self._passes:
            batches = self.loader.batches(np.arange(num_samples), batch_size)
            self._passes[num_samples, batch_size] = len(batches), sum(map(len, batches))
        return self._passes[num_samples, batch_size]

    def num_samples_of(self, clients: IntArray) -> IntArray:
        """Return the number of samples of each of these clients."""
        # `partition.sizes` has the sizes of all clients.
        offsets = self.partition.offsets
        sizes: IntArray = offsets[clients + 1] - offsets[clients]
        return sizes

    def _sized(self, clients: IntArray) -> Iterator[tuple[int, int]]:
        return zip(clients.tolist(), self.num_samples_of(clients).tolist(), strict=True)

    def _cost(self, local_steps: int | None, clients: IntArray) -> IntArray:
        # By samples; with local_steps every client does the same work.
        sizes = self.num_samples_of(clients)
        return sizes if local_steps is None else sizes * 0 + local_steps

    def of_client(self, client: int, plan: RoundPlan, cursor: Cursor) -> LocalWork:
        """Return the work of a client in a round.

        Args:
            client: index of the client.
            plan: of the round.
            cursor: where it resumes in its data; used with ``local_steps`` only.
        """
        indices, options = self.partition.client(client), self._options

        def batches_of(number: int) -> list[list[int]]:
            shuffle = self.loader.shuffle
            order = pass_order(indices, shuffle=shuffle, seed=self._seed, client=client, number=number)
            return self.loader.batches(order, None if self.fleet is None else self.fleet.batch_size(client))

        if plan.local_steps is not None:
            batches, cursor = steps_from(cursor, plan.local_steps, batches_of)
        else:
            assert options.local_epochs is not None
            batches, cursor = epochs_from(plan.round * options.local_epochs, options.local_epochs, batches_of), (0, 0)
        return LocalWork(client, len(indices), batches, cursor, (options.seed, plan.round))
