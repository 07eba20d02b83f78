"""chemprop: its message passing network over batches of molecular graphs, unmodified; clients are five laboratories.

The molecules and their polar surface areas are those of the National Cancer Institute that RDKit ships for its own
tests. Every laboratory works on molecules of about one size. `make existing` installs what this needs and runs it.
"""

import csv
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
from chemprop import data, models, nn
from comparison import QUIET, compare
from rdkit import Chem, RDConfig, RDLogger

from lightning_fedscale import FederatedStrategy, Partition

LABORATORIES = 5

RDLogger.DisableLog("rdApp.*")
with Path(RDConfig.RDDataDir, "NCI", "first_5k.tpsa.csv").open() as file:
    rows = [row for row in csv.reader(file) if len(row) == 2][:1500]
known = [(Chem.MolFromSmiles(smiles), float(area)) for smiles, area in rows]
points = [data.MoleculeDatapoint(mol, np.array([area])) for mol, area in known if mol is not None]
order = np.random.default_rng(0).permutation(len(points))
held_out = data.MoleculeDataset([points[i] for i in order[1200:]])
training = data.MoleculeDataset([points[i] for i in order[:1200]])
scaler = training.normalize_targets()

atoms = np.array([mol.GetNumAtoms() for mol in training.mols])
by_size = Partition.from_lists(np.array_split(np.argsort(atoms, kind="stable"), LABORATORIES))


def train(strategy, epochs):
    trainer = pl.Trainer(strategy=strategy, max_epochs=epochs, accelerator="cpu", **QUIET)
    unscale = nn.UnscaleTransform.from_standard_scaler(scaler)
    model = models.MPNN(
        nn.BondMessagePassing(d_h=100),
        nn.NormAggregation(),
        nn.RegressionFFN(input_dim=100, hidden_dim=100, output_transform=unscale),
        metrics=[nn.metrics.MAE(), nn.metrics.R2Score()],
        init_lr=1e-3,
        max_lr=3e-3,
        final_lr=3e-4,
    )
    trainer.fit(model, data.build_dataloader(training, batch_size=32))
    found = trainer.test(model, data.build_dataloader(held_out, shuffle=False), verbose=False)[0]
    areas = held_out.Y[:, 0]
    return {
        "MAE in square angstroms": found["test/mae"],
        "R2": found["test/r2"],
        "MAE of the mean area": float(np.abs(areas - scaler.mean_[0]).mean()),
    }


if __name__ == "__main__":
    compare("chemprop", train, FederatedStrategy(partitioner=by_size), passes=10, rounds=40)
