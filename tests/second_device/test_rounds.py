"""Whole rounds of the sequential executor's parts, what clients keep, and vectors of modules, on the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from lightning_fedscale import aggregators, compressors, privacy, server
from lightning_fedscale.callbacks.critical_phase.update_scaling import UpdateScaling
from lightning_fedscale.compressors import Compressor
from lightning_fedscale.core.client_state import ClientStore, OptimizerKeeper
from lightning_fedscale.core.executors.client_delta import Deltas
from lightning_fedscale.core.executors.correction import ClientCorrection
from lightning_fedscale.core.executors.device_cache import DeviceData
from lightning_fedscale.core.executors.shared_tensors import SharedTensors, shared_tensors_of
from lightning_fedscale.core.lightning.half_batch_gradients import squared_norm
from lightning_fedscale.core.lightning.log_series import read_numbers
from lightning_fedscale.core.options.algorithm_options import AlgorithmOptions
from lightning_fedscale.core.plan import RoundPlan
from lightning_fedscale.core.round.accumulator import RoundAccumulator
from lightning_fedscale.core.round.client_pipeline import DITTO, PERSONAL, ClientPipeline, PersonalPipeline
from lightning_fedscale.core.round.client_states import ClientStates
from lightning_fedscale.core.round.merge import RoundTable
from lightning_fedscale.core.round.server_step import GlobalModel
from lightning_fedscale.local_rules import Correction, Ditto, LocalRule
from lightning_fedscale.phases import noise
from lightning_fedscale.privacy import Privacy
from lightning_fedscale.types import Cohort
from lightning_fedscale.utils.collectives import JointBuffer
from tests.second_device.device import DEVICE, is_there, second_device, through_checkpoint
from tests.second_device.models import CLIENTS, Net, backward, cohort, net, train, update, vector
from tests.unit.test_contracts import example, of


class Rounds:
    """Rounds of all clients in one module, put together as the library does.

    Args:
        rule: the clients' local rule.
        compressor: of what they send.
        private: their privacy.
    """

    def __init__(self, rule: LocalRule | None, compressor: Compressor | None, private: Privacy | None) -> None:
        self.module = net()
        self.optimizer = SGD([p for p in self.module.parameters() if p.requires_grad], lr=0.1)
        self.keeper = OptimizerKeeper(self.optimizer)
        self.rules = AlgorithmOptions(rule, compressor, private, aggregators.mean())
        self.model = GlobalModel(self.rules, server.fed_avgm(), compressors.qsgd())
        self.model.calibrate(self.rules, 4.0)
        self.store = ClientStore()
        self.correction = ClientCorrection()

    def resume(self) -> None:
        """Read everything that is kept from a checkpoint."""
        self.store.load_state_dict(through_checkpoint(self.store.state_dict()), DEVICE)
        self.model.load_states(through_checkpoint(self.model.states), DEVICE)

    def run(self) -> Tensor:
        """Train a round; return the aggregate."""
        shared = shared_tensors_of(self.module)
        start, who = shared.view.copy(), cohort(shared.view.trainable)
        states = self.model.open_round(shared.view)
        table = RoundTable(RoundPlan(0, CLIENTS, np.zeros(len(CLIENTS), dtype=np.int64)), 1, len(shared.parameters))
        accumulator = RoundAccumulator(self.rules, shared.view.zeros(), who, table, 1)
        pipeline = self._pipeline(shared, who, states)
        deltas = Deltas(shared, start)
        for place, client in enumerate(CLIENTS.tolist()):
            self.keeper.load(None)
            self.correction.begin(shared, pipeline.correction(client) or Correction())
            backward(self.module)
            self.correction(self.optimizer)
            self.optimizer.step()
            shared.rebind()
            delta = deltas.of(None)
            delta.norm()
            sent = pipeline.send(update(place, delta))
            table.clients.add(sent.update, sent.weight, (0, 0), (0.0, 0.0))
            shared.strip(sent.update)
            accumulator.add(sent.update, sent.weight, sent.message)
            shared.view.write_copy(start)
        self.store.commit()
        table.finish_rank(0, 1.0, failed=False)
        total, messages = accumulator.merge()
        aggregate = self.model.aggregate(start, total, table, who, messages)
        self.model.move(shared, start, aggregate, who, training=True, mean_square=1.0)
        return aggregate

    def _pipeline(self, shared: SharedTensors, who: Cohort, states: dict[str, Any]) -> ClientPipeline:
        def gradient_of(client: int, tally: Any) -> Tensor:
            return vector(shared.view.trainable)

        return ClientPipeline(
            self.rules, self.store, shared, who, self.optimizer, states, starts={}, scales={2: 0.5},
            gradient_of=gradient_of,
        )  # fmt: skip


@pytest.mark.parametrize("compressor", [None, "top_k"], ids=str)
@pytest.mark.parametrize("private", [False, True], ids=["", "private"])
@pytest.mark.parametrize("name", [None, *of("local_rules")], ids=str)
def test_rounds_before_and_after_an_interruption(name: str | None, private: bool, compressor: str | None) -> None:
    rule = None if name is None else example("local_rules", name)
    if private and rule is not None and (rule.sends_message or rule.needs_sgd):
        pytest.skip("refused together")
    dp = privacy.dp_fed_avg(clip_norm=1.0, noise_multiplier=1.0, delta=1e-5) if private else None
    squeeze = None if compressor is None else compressors.error_feedback(compressors.by_name(compressor))
    with second_device():
        rounds = Rounds(rule, squeeze, dp)
        assert is_there(rounds.run())
        rounds.resume()
        assert is_there(rounds.run())


def test_ditto_after_an_interruption() -> None:
    with second_device():
        shared = shared_tensors_of(net())
        start, store = shared.view.read(), ClientStore()
        saved = {"cursors": torch.zeros(0, 3, dtype=torch.int64), DITTO: {7: shared.view.read().cpu()}}
        store.load_state_dict(saved, DEVICE)
        pipeline = PersonalPipeline(Ditto(0.1), store, shared, start)
        own = pipeline.start(7)
        assert own is not None
        shared.view.write(own)
        assert is_there(pipeline.correction(7).shift)
        pipeline.keep(update(0, shared.view.empty())._replace(client=7))
        store.commit()
        assert is_there(store.states.get(7, DITTO))


@pytest.mark.parametrize("ditto", [None, Ditto(0.1)], ids=["layers", "ditto"])
def test_personal_models_are_where_the_module_is_after_fit(ditto: Ditto | None) -> None:
    """Lightning moves the module to the CPU then; what clients keep stays on the device."""
    rules = AlgorithmOptions(None, None, None, aggregators.mean(), ("out.*",) if ditto is None else (), ditto)
    options: Any = SimpleNamespace(client_state_memory=None, keep_optimizers=False, algorithm=rules, local_steps=None)
    with second_device():
        clients = ClientStates(options, rank=0, world_size=1, device=DEVICE, processes=1)
        trained = shared_tensors_of(net(unusual=True), rules.own)
        clients.store.states.put(7, PERSONAL, trained.copy_personal())
        clients.store.states.put(7, DITTO, trained.view.read())
        module = Net(unusual=True)
        model = clients.personal_model(7, module.state_dict(), shared_tensors_of(module, rules.own))
        assert model is not None
        assert {value.device.type for value in model.values()} == {"cpu"}


@pytest.mark.parametrize("unusual", [False, True], ids=["", "unusual"])
def test_vectors_of_modules(unusual: bool) -> None:
    with second_device():
        module = net(unusual=unusual)
        shared = shared_tensors_of(module, ["out.*"])
        view = shared.view
        whole = view.read()
        view.write(whole)
        view.write_copy(view.copy())
        assert is_there(Deltas(shared, view.copy()).of(whole).vector())
        assert is_there(view.substituted(module.state_dict(), whole))
        assert is_there(shared.origin(whole))
        shared.write_personal({name: tensor.clone() for name, tensor in shared.personal.items()})
        shared.rebind()


WAYS: list[dict[str, bool]] = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"capturable": True}]


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW, RMSprop])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_optimizers_that_clients_keep(kind: type[Optimizer], way: dict[str, bool]) -> None:
    if ("fused" in way and kind in (SGD, RMSprop)) or ("capturable" in way and kind is SGD):
        pytest.skip("there is none, or it does not run without contents")
    with second_device():
        module = net()
        options: dict[str, Any] = {"lr": 0.1, **way}
        optimizer = kind([p for p in module.parameters() if p.requires_grad], **options)
        keeper = OptimizerKeeper(optimizer)
        keeper.load(None)
        train(module, optimizer)
        kept = keeper.unload()
        for state in (None, None, through_checkpoint(kept)):  # the second one is made in the same memory
            keeper.load(state)
            train(module, optimizer)


def test_what_callbacks_compute() -> None:
    with second_device():
        gradients = [torch.empty(3, device=DEVICE)]
        state = noise.diagonal_update(noise.diagonal_init(gradients), gradients)
        state = noise.diagonal_update(through_checkpoint(state).to(DEVICE), gradients)
        assert is_there(list(state[:2]))
        assert is_there(squared_norm(gradients))
        weight = nn.Parameter(torch.empty(3, device=DEVICE))
        for optimizer in (SGD([weight], lr=0.1), AdamW([weight], lr=0.1)):
            weight.grad = torch.empty(3, device=DEVICE)
            UpdateScaling(optimizer).apply(2.0)
            optimizer.step()


def test_data_and_logged_values() -> None:
    with second_device():
        data = DeviceData([torch.empty(10, 3, device=DEVICE), torch.empty(10, dtype=torch.int64, device=DEVICE)])
        assert is_there(data.batch([1, 2]))
        assert is_there(data.stacked([[1, 2], [3, 4]]))
        assert is_there(list(data.batches([[1], [2, 3]])))
        values = [torch.empty((), device=DEVICE), 1.0, torch.empty(3, device=DEVICE)]
        assert read_numbers(values, DEVICE).shape == (5,)
        joint = JointBuffer(vector(4), 2)
        assert is_there(joint.sum_over_ranks(joint.vector, torch.empty(2, dtype=torch.float64)))


def test_a_module_on_the_device_is_what_these_tests_take_it_for() -> None:
    with second_device() as seen:
        module = net()
        assert is_there(module.state_dict())
        with pytest.raises(RuntimeError, match="device"):
            module.frozen + torch.zeros(5)
        assert float(module.frozen.detach().sum()) == 3.0
        assert seen.reads.total() == 1
    assert not is_there(Net().state_dict())
