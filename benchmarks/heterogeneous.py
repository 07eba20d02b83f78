"""Clients that want different things: where FedAvg goes, and where SCAFFOLD, FedDyn and FedNova go.

    python -m benchmarks.heterogeneous      some seconds; writes results/heterogeneous.md and .png

Twenty clients have quadratic losses of different curvature and different optima, so that everything is known: the
optimum of their mean, and the point at which FedAvg comes to rest. No Trainer, no data, no noise: only the rules.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure

from lightning_fedscale import local_rules, samplers
from lightning_fedscale.local_rules import Correction, LocalRule, Merged, Outcome, Report
from lightning_fedscale.types import Cohort

Array = npt.NDArray[np.float64]
RESULTS = Path(__file__).parent / "results"
CLIENTS, PER_ROUND, ROUNDS = 20, 5, 2000
RATE = 0.05


class Quadratics(NamedTuple):
    """Clients with losses ``(y - optima[k])' curvatures[k] (y - optima[k]) / 2``.

    Attributes:
        curvatures: one symmetric, positive definite matrix per client.
        optima: one point per client.
        steps: local steps of each client.
    """

    curvatures: Array
    optima: Array
    steps: tuple[int, ...]

    def gradient(self, client: int, point: Array) -> Array:
        """Gradient of one client's loss."""
        result: Array = self.curvatures[client] @ (point - self.optima[client])
        return result

    def optimum(self, weights: Array | None = None) -> Array:
        """Where the weighted mean of the losses is least; without weights, the plain mean."""
        scaled = self.curvatures if weights is None else self.curvatures * weights[:, None, None]
        result: Array = np.linalg.solve(scaled.sum(0), np.einsum("kij,kj->i", scaled, self.optima))
        return result

    def rest_of_fed_avg(self, lr: float) -> Array:
        """Where FedAvg with all clients and equal weights comes to rest: its deltas cancel there.

        A client goes from ``x`` to ``b + (I - lr A)^H (x - b)``.
        """
        eye = np.eye(self.optima.shape[1])
        ways = np.stack(
            [
                eye - np.linalg.matrix_power(eye - lr * curvature, steps)
                for curvature, steps in zip(self.curvatures, self.steps, strict=True)
            ]
        )
        result: Array = np.linalg.solve(ways.sum(0), np.einsum("kij,kj->i", ways, self.optima))
        return result


def make(clients: int, dimensions: int, steps: tuple[int, ...], seed: int = 0) -> Quadratics:
    """Clients with curvatures between 0.1 and 3 in random directions."""
    rng = np.random.default_rng(seed)
    turns = np.linalg.qr(rng.normal(size=(clients, dimensions, dimensions)))[0]
    spread = np.exp(rng.uniform(np.log(0.1), np.log(3.0), size=(clients, dimensions)))
    curvatures = np.einsum("kij,kj,klj->kil", turns, spread, turns)
    return Quadratics(curvatures, rng.normal(size=(clients, dimensions)), steps)


def federate(
    problem: Quadratics,
    rule: LocalRule | None,
    *,
    rounds: int,
    per_round: int,
    lr: Callable[[int], float] | float,
    momentum: float = 0.0,
    server_lr: float = 1.0,
    weights: Array | None = None,
    seed: int = 0,
) -> Array:
    """The global model from the start, 0, to the end of the last round: (rounds + 1, dimensions).

    Args:
        problem: the clients.
        rule: what they do; None is plain local SGD.
        rounds: number of rounds.
        per_round: how many take part in a round.
        lr: of the clients, by round or always.
        momentum: of the clients.
        server_lr: of the server.
        weights: of the clients in the aggregated delta; None for equal ones.
        seed: of the cohorts.
    """
    clients, dimensions = problem.optima.shape
    server = np.zeros(dimensions)
    kept: dict[int, object] = {}
    state = None if rule is None else rule.init(torch.from_numpy(server))
    path = [server]
    for round in range(rounds):
        chosen = samplers.uniform(seed=seed, round=round, num_clients=clients, clients_per_round=per_round)
        rate = lr(round) if callable(lr) else lr
        deltas, reports = [], []
        for client in chosen.tolist():
            correction = Correction() if rule is None else rule.begin(kept.get(client), state)
            delta = server - train(problem, client, server, correction, rate, momentum)
            start = torch.from_numpy(problem.gradient(client, server))
            outcome = Outcome(torch.from_numpy(delta), problem.steps[client], rate, momentum, start)
            reports.append(Report() if rule is None else rule.finish(outcome, kept.get(client), state))
            kept[client] = reports[-1].state
            deltas.append(outcome.delta.numpy())
        shares = np.ones(len(chosen)) if weights is None else weights[chosen]
        shares = shares / shares.sum()
        delta = torch.from_numpy(shares @ np.stack(deltas))
        if rule is not None:
            sent = [report.message for report in reports if report.message is not None]
            normalizer = float(shares @ [report.normalizer for report in reports])
            cohort = Cohort(round, chosen, num_clients=clients, trainable=dimensions, seed=seed)
            messages = torch.stack(sent).sum(0) if sent else None
            delta, state = rule.merge(Merged(delta, messages, normalizer, len(chosen), cohort), state)
        server = server - server_lr * delta.numpy()
        path.append(server)
    return np.stack(path)


def train(problem: Quadratics, client: int, start: Array, correction: Correction, lr: float, momentum: float) -> Array:
    """Where a client's local SGD ends."""
    shift = 0.0 if correction.shift is None else correction.shift.numpy()
    point, velocity = start.copy(), np.zeros_like(start)
    for _ in range(problem.steps[client]):
        gradient = problem.gradient(client, point) + shift + correction.proximal * (point - start)
        velocity = momentum * velocity + gradient
        point = point - lr * velocity
    return point


def _falling(round: int) -> float:
    return RATE / (1 + round / 50)


class Curve(NamedTuple):
    """One line of the plot."""

    name: str
    rule: LocalRule | None
    lr: Callable[[int], float] | float
    colour: str


EQUAL = [
    Curve("FedAvg", None, RATE, "#888888"),
    Curve("FedProx, mu 1", local_rules.fed_prox(1.0), RATE, "#d08020"),
    Curve("SCAFFOLD, option I", local_rules.scaffold("I"), RATE, "#60a0e0"),
    Curve("SCAFFOLD, option II", local_rules.scaffold("II"), RATE, "#2050a0"),
    Curve("FedDyn, alpha 1", local_rules.fed_dyn(1.0), RATE, "#30905a"),
]
UNEQUAL = [
    Curve("FedAvg", None, _falling, "#888888"),
    Curve("FedNova", local_rules.fed_nova(), _falling, "#a03060"),
]


def gaps(problem: Quadratics, curves: list[Curve], rounds: int, per_round: int) -> dict[str, Array]:
    """Distance to the optimum of the clients' plain mean, after every round, relative to that of the start."""
    optimum = problem.optimum()
    start = np.linalg.norm(optimum)
    return {
        curve.name: np.linalg.norm(
            federate(problem, curve.rule, rounds=rounds, per_round=per_round, lr=curve.lr) - optimum, axis=1
        )
        / start
        for curve in curves
    }


def draw(panels: dict[str, tuple[list[Curve], dict[str, Array]]], path: Path) -> None:
    """One panel per question, on logarithmic scales."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (title, (curves, measured)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for curve in curves:
            axes.semilogy(measured[curve.name], label=curve.name, color=curve.colour, linewidth=1.2)
        axes.set(title=title, xlabel="round", ylabel="distance to the optimum, relative to the start")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def report(panels: dict[str, tuple[list[Curve], dict[str, Array]]]) -> str:
    """The same in numbers."""
    lines = [
        "# Clients that want different things",
        "",
        f"{CLIENTS} clients with quadratic losses of different curvature (0.1 to 3 in random directions) and different"
        f" optima, full gradients. Distance of the global model to the optimum of the"
        f" clients' plain mean, relative to that of the start. The local learning rate is {RATE};"
        " with unequal steps it falls as 1 / (1 + round / 50), since what remains of FedNova's bias is in proportion to"
        " it (`python -m benchmarks.heterogeneous`).",
        "",
        "![Distance to the optimum over rounds](heterogeneous.png)",
    ]
    marks = (10, 100, 500, ROUNDS)
    for title, (_, measured) in panels.items():
        lines += ["", f"## {title}", "", "| | " + " | ".join(f"round {mark}" for mark in marks) + " |"]
        lines.append("|---|" + "---:|" * len(marks))
        for name, values in measured.items():
            lines.append(f"| {name} | " + " | ".join(f"{values[mark]:.1e}" for mark in marks) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    equal = make(CLIENTS, 5, (10,) * CLIENTS)
    unequal = make(CLIENTS, 5, tuple(2 + 2 * (k % 10) for k in range(CLIENTS)))
    panels = {
        f"{PER_ROUND} of {CLIENTS} clients, 10 local steps": (EQUAL, gaps(equal, EQUAL, ROUNDS, PER_ROUND)),
        "All clients, 2 to 20 local steps": (UNEQUAL, gaps(unequal, UNEQUAL, ROUNDS, CLIENTS)),
    }
    draw(panels, output / "heterogeneous.png")
    (output / "heterogeneous.md").write_text(report(panels), encoding="utf-8")
    print(report(panels))


if __name__ == "__main__":
    main()
