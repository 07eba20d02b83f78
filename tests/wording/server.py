"""Messages of `server`."""

from __future__ import annotations

import torch
from torch.optim import SGD, lr_scheduler

from lightning_fedscale import server
from lightning_fedscale.server.asynchrony import FedBuff
from lightning_fedscale.server.registry import by_name
from tests.wording import Row

PARAMS = {"w": torch.zeros(1)}


ROWS: list[Row] = [
    Row(
        lambda: by_name("fed_adm"),
        ValueError,
        "server_optimizer='fed_adm' is not known. Did you mean 'fed_adam'? Known: 'fed_avg', 'fed_avgm', "
        "'fed_adagrad', 'fed_adam', 'fed_yogi', 'fed_exp', 'nesterov', 'from_torch', 'chain', 'scheduled'.",
    ),
    Row(
        lambda: by_name("from_torch"),
        ValueError,
        "server_optimizer='from_torch' needs optimizer: pass an object, from_torch(optimizer=...).",
    ),
    Row(
        lambda: server.fed_avg(0),
        ValueError,
        "lr=0: pass a finite number above 0.",
    ),
    Row(
        lambda: server.fed_avg("1"),  # type: ignore[arg-type]
        TypeError,
        "lr='1': pass a finite number above 0.",
    ),
    Row(
        lambda: server.fed_avgm(momentum=1.0),
        ValueError,
        "momentum=1.0: pass a number in [0, 1).",
    ),
    Row(
        lambda: server.chain(),
        ValueError,
        "chain(): pass at least one server optimizer, chain(scale_by_adam(), scale(0.01)).",
    ),
    Row(
        lambda: server.chain("adam"),  # type: ignore[arg-type]
        TypeError,
        "chain: argument 0 is 'adam': pass a server optimizer, such as server.scale(0.1).",
    ),
    Row(
        lambda: server.chain(server.fed_avg(), server.fed_exp()),
        ValueError,
        "chain: argument 1 reads the norms of the clients' deltas, which the rules before it change: pass it first.",
    ),
    Row(
        lambda: server.scheduled(SGD, lr_scheduler.StepLR),  # type: ignore[arg-type]
        TypeError,
        "scheduled: rule=<class 'torch.optim.sgd.SGD'>: pass a server optimizer, such as server.fed_adam(lr=0.01).",
    ),
    Row(
        lambda: server.scheduled(server.fed_avg(), lr_scheduler.ReduceLROnPlateau),
        TypeError,
        "scheduled: scheduler=ReduceLROnPlateau follows a metric, which is unknown here: pass another.",
    ),
    Row(
        lambda: server.scheduled(server.fed_avg(), lr_scheduler.StepLR),
        TypeError,
        "scheduled: StepLR() fails (StepLR.__init__() missing 1 required positional argument: 'step_size'): "
        "pass a class of torch.optim.lr_scheduler and its arguments.",
    ),
    Row(
        lambda: server.from_torch(SGD, rate=1),
        TypeError,
        "from_torch(SGD, rate=1) fails (SGD.__init__() got an unexpected keyword argument 'rate'): pass a "
        "class such as torch.optim.SGD, whose step needs no closure, and its arguments.",
    ),
    Row(
        lambda: server.fed_adam().update(PARAMS, {"optimizer": "trace"}, PARAMS),
        ValueError,
        "server_optimizer=chain of 2: the checkpoint has the state of trace: resume with the server optimizer "
        "of the checkpoint, or start a new run without ckpt_path.",
    ),
    Row(
        lambda: FedBuff(staleness="hinge"),  # type: ignore[arg-type]
        ValueError,
        "staleness='hinge': pass 'polynomial', by which an older update counts less (exponent=0.5 sets how much), or"
        " 'constant', by which all count alike.",
    ),
    Row(
        lambda: FedBuff(exponent=-1),
        ValueError,
        "exponent=-1: pass a number of at least 0; the paper's is 0.5.",
    ),
    Row(
        lambda: FedBuff(seconds=[0.0]),
        ValueError,
        "seconds=[0.0]: pass one number above 0 per client.",
    ),
    Row(
        lambda: FedBuff(concurrency=4).concurrent(2, 4),
        ValueError,
        "concurrency=4 with clients_per_round=2: this needs 5 clients, since clients with an update in the "
        "buffer do not train, and there are 4: lower one of them.",
    ),
]
