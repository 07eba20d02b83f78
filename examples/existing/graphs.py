"""torch_geometric: its network over batches of graphs, unmodified; clients see different mixes of kinds of graphs.

The graphs are drawn by the package's own functions, and the network has to tell by which one from the edges alone.
`make existing` installs what this needs and runs it.
"""

import lightning.pytorch as pl
import torch
from checks import check
from comparison import QUIET, compare
from torch.nn.functional import cross_entropy
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GIN, global_mean_pool
from torch_geometric.utils import barabasi_albert_graph, erdos_renyi_graph, stochastic_blockmodel_graph

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.partitioners import DirichletPartitioner

KINDS = (
    lambda nodes: erdos_renyi_graph(nodes, 4 / nodes),
    lambda nodes: barabasi_albert_graph(nodes, 2),
    lambda nodes: stochastic_blockmodel_graph([nodes // 2] * 2, [[10 / nodes, 2 / nodes], [2 / nodes, 2 / nodes]]),
)


def draw(number):
    graphs = []
    for i in range(number):
        nodes = 20 + 2 * (i % 11)
        edges = KINDS[i % len(KINDS)](nodes)
        graphs.append(Data(x=torch.ones(nodes, 1), edge_index=edges, y=torch.tensor([i % len(KINDS)])))
    return graphs


class TellGraphs(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = GIN(in_channels=1, hidden_channels=32, num_layers=3)
        self.head = torch.nn.Linear(32, len(KINDS))

    def forward(self, batch):
        return self.head(global_mean_pool(self.network(batch.x, batch.edge_index), batch.batch))

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self(batch), batch.y)
        self.log("loss", loss, batch_size=batch.num_graphs)
        return loss

    def validation_step(self, batch, batch_idx):
        right = (self(batch).argmax(1) == batch.y).float().mean()
        self.log("accuracy", right, batch_size=batch.num_graphs)

    def predict_step(self, batch, batch_idx):
        return self(batch).argmax(1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


pl.seed_everything(0, verbose=False)
training, held_out = draw(1200), draw(300)


def loaders():
    return DataLoader(training, batch_size=32, shuffle=True), DataLoader(held_out, batch_size=100)


def federated(**options):
    return FederatedStrategy(partitioner=DirichletPartitioner(8, partition_by="y", alpha=0.5), **options)


def train(strategy, epochs):
    trainer = pl.Trainer(strategy=strategy, max_epochs=epochs, accelerator="cpu", **QUIET)
    model = TellGraphs()
    trainer.fit(model, *loaders())
    found = torch.cat(trainer.predict(model, loaders()[1]))
    return {
        "kinds of held-out graphs told, %": 100
        * (found == torch.cat([graph.y for graph in held_out])).float().mean().item()
    }


if __name__ == "__main__":
    compare("torch-geometric", train, federated(), passes=10, rounds=40)
    check(TellGraphs, loaders, federated)
