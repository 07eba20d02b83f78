"""scvi-tools: its model of single cells, trainer wrapper and data splitter, unmodified; clients are eight hospitals.

The counts are drawn here: six types of cells, negative binomial over 200 genes, every hospital with its own mix of
types and way of measuring. `make existing` installs what this needs and runs it.

The strategy goes into ``trainer_config``. Given as ``train(strategy=...)`` scvi-tools takes it for DDP, to which it is
related, and prepares its loaders for several processes.
"""

import anndata
import numpy as np
import scvi
from comparison import compare
from sklearn.neighbors import KNeighborsClassifier

from lightning_fedscale import FederatedStrategy, Partition

HOSPITALS, CELLS, GENES, TYPES = 8, 300, 200, 6


def draw():
    rng = np.random.default_rng(0)
    expressed = rng.gamma(1.0, 3.0, (TYPES, GENES))  # means by type
    measured = rng.lognormal(0.0, 0.3, (HOSPITALS, GENES))  # factors by hospital
    hospital = np.repeat(np.arange(HOSPITALS), CELLS)
    mixes = rng.dirichlet(np.full(TYPES, 0.5), HOSPITALS)
    kind = np.concatenate([rng.choice(TYPES, CELLS, p=mix) for mix in mixes])
    mean = 0.2 * expressed[kind] * measured[hospital]
    counts = rng.poisson(rng.gamma(2.0, mean / 2.0)).astype(np.float32)
    return anndata.AnnData(counts, obs={"hospital": hospital.astype(str), "kind": kind.astype(str)})


cells = draw()
hospital, kind = cells.obs["hospital"].to_numpy(), cells.obs["kind"].to_numpy()
order = np.random.default_rng(1).permutation(len(cells))
training, held_out = order[:2000], order[2000:]
by_hospital = Partition.from_lists([np.flatnonzero(hospital[training] == str(h)) for h in range(HOSPITALS)])


def train(strategy, epochs):
    scvi.settings.verbosity = 40
    scvi.model.SCVI.setup_anndata(cells, batch_key="hospital")
    model = scvi.model.SCVI(cells, n_latent=5)
    model.train(
        max_epochs=epochs,
        accelerator="cpu",
        batch_size=64,
        datasplitter_kwargs={"external_indexing": [training, held_out, np.array([], dtype=int)]},
        plan_kwargs={"n_epochs_kl_warmup": 10, "lr": 0.003},
        trainer_config={"strategy": strategy, "enable_progress_bar": False},
    )
    where = model.get_latent_representation()
    neighbours = KNeighborsClassifier().fit(where[training], kind[training])
    return {
        "negative ELBO of held-out cells": -float(model.get_elbo(indices=held_out)),
        "types told from 5 neighbours in latent space, %": 100 * neighbours.score(where[held_out], kind[held_out]),
    }


if __name__ == "__main__":
    compare("scvi-tools", train, FederatedStrategy(partitioner=by_hospital), passes=10, rounds=40)
