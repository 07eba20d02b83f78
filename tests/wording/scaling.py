"""Messages of `scaling`."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from lightning_fedscale import scaling
from lightning_fedscale.scaling.agreement import check_clients
from lightning_fedscale.scaling.made_for import MadeFor
from lightning_fedscale.scaling.rho import UNMEASURED, rho_of
from lightning_fedscale.scaling.runs import runs_to_fit
from tests.wording import Row

TABLE = pd.DataFrame({"params": [1e3, 2e3], "tokens": [1e5, 1e5], "loss": [0.5, 0.4]})
LAW = scaling.Chinchilla(
    made_for=MadeFor(method="scaffold", partition="sites.json", clients=(8,), local_steps=5),
    fitted_on=scaling.Range("text", clients=(8, 8)),
)


def fitting(**columns: str | float) -> Callable[[], object]:
    """A fit to a small table with other columns."""
    return lambda: scaling.fit(TABLE.assign(**columns), bootstrap=0)


ROWS: list[Row] = [
    Row(lambda: scaling.plan(-1.0), ValueError, "flops=-1.0: pass a finite number above 0."),
    Row(
        lambda: scaling.plan(1e20, law=None),
        ValueError,
        "law=None: pass a law, its name, or a file of Fit.save, such as the one that fedscale sweep writes.",
    ),
    Row(lambda: scaling.plan(1e20, local_steps=0), ValueError, "local_steps=0: pass a whole number, at least 1."),
    Row(
        lambda: scaling.plan(1e20, utilization=2.0),
        ValueError,
        "utilization=2.0: pass a fraction of the device's peak speed, in (0, 1].",
    ),
    Row(
        lambda: scaling.plan(1e20, device_class=("phone",)),  # type: ignore[arg-type]
        TypeError,
        "device_class='phone': pass device classes, such as lightning_fedscale.devices.device_class('phone').",
    ),
    Row(
        lambda: scaling.plan(1e20, batch_size=16),
        ValueError,
        "batch_size=16: the law Chinchilla counts tokens, and its runs do not record how many tokens a sample has."
        " Leave batch_size out.",
    ),
    Row(
        lambda: check_clients(LAW, 16, UNMEASURED),
        ValueError,
        "clients=16: all runs of this law had 8, so the cost of another number (rho) is unknown. Pass clients=8, or"
        " rho= (a number, or the ends of an interval, such as (0, 1)), or measure it by a sweep of several numbers:"
        " fedscale sweep --clients '[8,16]'.",
    ),
    Row(
        lambda: rho_of("x"),
        ValueError,
        "rho='x': pass a number (1 counts the average client's compute, 0 that of all clients), the two ends of an"
        " interval, or 'auto'.",
    ),
    Row(
        lambda: scaling.law_by_name("chinchila"),
        ValueError,
        "law='chinchila' is not known. Did you mean 'Chinchilla'? Known: " + ", ".join(map(repr, scaling.LAWS)) + ".",
    ),
    Row(
        lambda: scaling.law_of(3, text=True),
        TypeError,
        "law=3: pass 'auto', a law's name, a file of Fit.save, a law, or None.",
    ),
    Row(lambda: scaling.law_from_file("no.json"), ValueError, "law='no.json': there is no such file."),
    Row(
        lambda: scaling.Rosenfeld().loss(1e6, 1e6),
        scaling.Unfitted,
        "Rosenfeld: its constants are not published (E, A, B, alpha, beta unknown): fit them to your own runs, or pass"
        " them: Rosenfeld(E=..., A=..., B=..., alpha=..., beta=...).",
    ),
    Row(
        lambda: scaling.Chinchilla(problems=("only 3 sizes",)).optimal(1e20),
        ValueError,
        "Chinchilla: its runs do not determine a best size (only 3 sizes). Add sizes, data or compute to the runs and"
        " fit the law again, or name another law.",
    ),
    Row(
        lambda: scaling.Chinchilla().loss(97.0, 1e9),
        UserWarning,
        "Chinchilla: params=97 lies outside of 4e+07 to 2e+10, the range that the law was fitted on, so this is an"
        " extrapolation.",
    ),
    Row(
        lambda: scaling.Chinchilla().optimal_federated([1e18, 1e18], clients=3),
        ValueError,
        "clients=3: flops= has the compute of 2 clients. Leave clients out.",
    ),
    Row(lambda: scaling.mean_flops([]), ValueError, "flops=[]: pass the compute of at least one client."),
    Row(lambda: scaling.mean_flops([1.0], "x"), ValueError, "how='x': choose 'mean', 'uniform' or 'by_compute'."),
    Row(lambda: scaling.effective_flops(1e9, 0), ValueError, "clients=0: pass a whole number, at least 1."),
    Row(
        lambda: scaling.DiLoCo().loss(1e9, 1e9),
        ValueError,
        "tokens=1e+09: DiLoCo's law holds only at 20 tokens per parameter. Pass 2e+10 tokens for this size, or name"
        " another law.",
    ),
    Row(lambda: scaling.EMARule(1.0), ValueError, "decay=1.0: pass a number in [0, 1)."),
    Row(
        lambda: scaling.Chinchilla().flops_for(1.0),
        ValueError,
        "loss=1.0: no compute brings it to the irreducible loss, 1.817, or below.",
    ),
    Row(
        lambda: scaling.fit(TABLE.drop(columns="loss")),
        ValueError,
        "runs: the column loss is missing; there are params, tokens.",
    ),
    Row(fitting(loss="n/a"), ValueError, "runs: loss='n/a' in row 0 is not a number. Write it as 12000 or 1.2e4."),
    Row(fitting(loss=-1.0), ValueError, "runs: loss=-1 in row 0: leave out runs without a finite loss above 0."),
    Row(fitting(clients=0.5), ValueError, "runs: clients=0.5 in row 0: pass whole numbers, at least 1."),
    Row(fitting(), ValueError, "runs: 2 runs cannot determine 5 constants. Pass 10 or more."),
    Row(lambda: scaling.fit(TABLE, bootstrap=-1), ValueError, "bootstrap=-1: pass a number of refits, at least 0."),
    Row(
        lambda: scaling.fit(TABLE, law="Porian"),
        ValueError,
        "law='Porian' has no constants to be fitted: isoflop(runs).law is that law of your runs.",
    ),
    Row(
        lambda: runs_to_fit(TABLE, scaling.Rosenfeld(), method="scaffold"),
        ValueError,
        "method='scaffold': the table of runs does not record their methods. Leave this argument out, or add the"
        " column.",
    ),
    Row(
        lambda: runs_to_fit(TABLE.assign(method="fed_avg"), scaling.Rosenfeld(), method="scaffold"),
        ValueError,
        "method='scaffold': no run matches. Pass one of those in the table: fed_avg.",
    ),
    Row(
        lambda: runs_to_fit(TABLE.assign(partition="iid"), scaling.Rosenfeld(), partition="no.json"),
        ValueError,
        "partition='no.json': this file does not exist. Write it with Partition.save.",
    ),
    Row(lambda: scaling.read_runs("nowhere"), ValueError, "runs='nowhere': there is no such file or directory."),
    Row(lambda: scaling.read_runs([]), ValueError, "runs=[]: pass a table, CSV files or run directories."),
    Row(
        lambda: scaling.read_runs([3]),  # type: ignore[list-item]
        TypeError,
        "runs: 3 is not the path of a CSV file or a run directory. Pass such a path.",
    ),
    Row(
        lambda: scaling.plan(1e20, law=LAW, method="fed_avg"),
        UserWarning,
        "plan: the law was fitted to runs with scaffold on partition sites.json, 8 clients, 5 local steps, and may not"
        " hold for method='fed_avg'; fit another one with fedscale sweep.",
    ),
    Row(
        lambda: scaling.plan(1e20, law=scaling.Chinchilla(), method="fed_avg"),
        UserWarning,
        "plan: the law's runs do not record their method, so whether it holds for method='fed_avg' is not known.",
    ),
]
