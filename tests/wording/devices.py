"""Messages of `devices`."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_fedscale.devices import (
    DeviceClass,
    MemoryModel,
    PerformanceModel,
    Population,
    StepTime,
    StepTimes,
    device_class,
    estimate_memory,
)
from lightning_fedscale.devices.profiling.batches import samples_in
from lightning_fedscale.devices.profiling.samples import largest_sample
from tests.wording import Row


def device(**figures: Any) -> DeviceClass:
    usual: dict[str, Any] = {"name": "box", "memory": 8, "flops": 1.0, "memory_bandwidth": 1.0, "up": 1.0, "down": 1.0}
    return DeviceClass(**usual | figures)


def estimate(**options: Any) -> MemoryModel:
    return estimate_memory(BoringModel(), torch.zeros(1, 32), **options)


STEP = StepTime(fixed=0.5, per_sample=0.0)


ROWS: list[Row] = [
    Row(
        lambda: device_class("fone"),
        ValueError,
        "device_class='fone' is not known. Did you mean 'phone'? Known: 'phone', 'old-phone', "
        "'raspberry-pi-5', 'jetson-nano', 'jetson', 'jetson-agx', 'laptop', 't4', 'a100', 'h100'. For other "
        "hardware, pass a DeviceClass.",
    ),
    Row(
        lambda: device_class(3),  # type: ignore[arg-type]
        TypeError,
        "device_class=3: pass a DeviceClass, or one of 'phone', 'old-phone', 'raspberry-pi-5', 'jetson-nano', "
        "'jetson', 'jetson-agx', 'laptop', 't4', 'a100', 'h100'.",
    ),
    Row(
        lambda: device(name=""),
        TypeError,
        "DeviceClass: name='': pass a name, such as 'phone'.",
    ),
    Row(
        lambda: device(memory=0),
        ValueError,
        "DeviceClass 'box': memory=0: pass a number above 0.",
    ),
    Row(
        lambda: device(flops="fast"),
        TypeError,
        "DeviceClass 'box': flops='fast': pass a number above 0; math.inf is allowed.",
    ),
    Row(
        lambda: device(memory=float("inf")),
        ValueError,
        "DeviceClass 'box': memory=inf: pass a finite number of bytes.",
    ),
    Row(
        lambda: device(latency=-1),
        ValueError,
        "DeviceClass 'box': latency=-1: pass a finite number of seconds, at least 0.",
    ),
    Row(
        lambda: device(availability=0),
        ValueError,
        "DeviceClass 'box': availability=0: pass a probability in (0, 1].",
    ),
    Row(
        lambda: Population({}),
        TypeError,
        "shares={}: pass shares by device class, such as {'phone': 0.7, 'jetson': 0.3}.",
    ),
    Row(
        lambda: Population({"toaster": 1}),
        ValueError,
        "device_class='toaster' is not known. Known: 'phone', 'old-phone', 'raspberry-pi-5', 'jetson-nano', "
        "'jetson', 'jetson-agx', 'laptop', 't4', 'a100', 'h100'. For other hardware, pass a DeviceClass.",
    ),
    Row(
        lambda: Population({"phone": 0}),
        ValueError,
        "shares['phone']=0: pass a share above 0, or leave this device class out.",
    ),
    Row(
        lambda: Population({"phone": 1, device(name="phone"): 1}),
        ValueError,
        "shares: device classes phone, phone: give each of them its own name.",
    ),
    Row(
        lambda: Population({"phone": 1}, over_selection=0.5),
        ValueError,
        "over_selection=0.5: pass a factor of at least 1, such as 1.3.",
    ),
    Row(
        lambda: Population({"phone": 1}, deadline=0),
        ValueError,
        "deadline=0: pass a number of seconds above 0, or None.",
    ),
    Row(
        lambda: Population({"phone": 1}, min_clients=0),
        ValueError,
        "min_clients=0: pass a number of clients, at least 1.",
    ),
    Row(
        lambda: Population({"phone": 1}, noise_scale=-1),
        ValueError,
        "noise_scale=-1: pass a number of samples above 0, or None.",
    ),
    Row(
        lambda: Population({"phone": 1}, headroom=1),
        ValueError,
        "headroom=1: pass the share of memory to leave free, in [0, 1).",
    ),
    Row(
        lambda: Population({"phone": 1}, seed=-1),
        ValueError,
        "seed=-1: pass an integer of at least 0.",
    ),
    Row(
        lambda: Population({"phone": 1}, batch_size="big"),  # type: ignore[arg-type]
        ValueError,
        "batch_size='big': pass one of 'largest', 'fastest', 'proportional', 'loader', or a dict of numbers by "
        "device class.",
    ),
    Row(
        lambda: Population({"phone": 1}, batch_size={"jetson": 8}),
        ValueError,
        "batch_size={'jetson': 8}: pass one number for each of 'phone'.",
    ),
    Row(
        lambda: Population({"phone": 1}, batch_size={"phone": 0}),
        ValueError,
        "batch_size['phone']=0: pass a number of samples, at least 1.",
    ),
    Row(
        lambda: estimate_memory(3, torch.zeros(1, 32)),  # type: ignore[arg-type]
        TypeError,
        "module=3: pass a LightningModule.",
    ),
    Row(
        lambda: estimate_memory(nn.Linear(1, 1), torch.zeros(1, 32)),
        TypeError,
        "module=Linear: it has no training_step: pass a LightningModule.",
    ),
    Row(
        lambda: estimate(device="tpu"),
        ValueError,
        "device='tpu': pass one of 'auto', 'cpu', 'cuda', 'other'. Did you mean 'cpu'?",
    ),
    Row(
        lambda: estimate(accumulate=0),
        ValueError,
        "accumulate=0: pass a number of batches per optimizer step, at least 1.",
    ),
    Row(
        lambda: estimate(precision="8-true"),
        ValueError,
        "precision='8-true': pass one of '16-mixed', 'bf16-mixed', '32-true', '64-true', '16-true', "
        "'bf16-true'. Did you mean '64-true'?",
    ),
    Row(
        lambda: estimate().max_batch(500),
        ValueError,
        "budget=500 B: a step with one sample takes 696 B, 246 bytes more than the 450 B that headroom=0.1 "
        "leaves; the largest part is parameters with 264 B. Use a larger budget, a smaller model, a lower "
        "precision, activation checkpointing, or an optimizer with less state.",
    ),
    Row(
        lambda: estimate().max_batch(0),
        ValueError,
        "budget=0: pass a positive number of bytes.",
    ),
    Row(
        lambda: estimate().max_batch(1000, headroom=1.0),
        ValueError,
        "headroom=1.0: pass the share of the budget to leave free, at least 0 and below 1.",
    ),
    Row(
        lambda: estimate().max_batch(10_000, limit=0),
        ValueError,
        "limit=0: pass a number of samples, at least 1.",
    ),
    Row(
        lambda: estimate().peak(0),
        ValueError,
        "batch=0: pass a number of samples, at least 1.",
    ),
    Row(
        lambda: samples_in("text"),
        ValueError,
        "batch=str: none of its tensors has a dimension of samples: pass make_batch=..., a function that "
        "returns a batch of so many samples.",
    ),
    Row(
        lambda: samples_in([torch.zeros(2), torch.zeros(3)]),
        ValueError,
        "batch=list: the first dimensions of its tensors differ (2, 3), so the number of samples is unknown: "
        "pass make_batch=..., a function that returns a batch of so many samples.",
    ),
    Row(
        lambda: largest_sample([]),
        ValueError,
        "train_dataloader: its dataset is empty: pass a dataset with at least one sample.",
    ),
    Row(
        lambda: StepTimes().fit(),
        ValueError,
        "StepTimes: no step has been measured: add one with a time above 0 first.",
    ),
    Row(
        lambda: StepTime(fixed=-1, per_sample=0),
        ValueError,
        "fixed=-1: pass seconds, at least 0.",
    ),
    Row(
        lambda: PerformanceModel(0.5),  # type: ignore[arg-type]
        TypeError,
        "step=0.5: pass a StepTime, such as fit_step_time(batches, seconds).",
    ),
    Row(
        lambda: PerformanceModel(STEP, sync=-1),
        ValueError,
        "sync=-1: pass seconds, at least 0, or a function of the number of clients.",
    ),
    Row(
        lambda: PerformanceModel(STEP, noise_scale=0),
        ValueError,
        "noise_scale=0: pass a number above 0, or None if it is unknown.",
    ),
    Row(
        lambda: PerformanceModel(STEP).rounds_to_target(8, clients=2),
        ValueError,
        "noise_scale=None: the number of steps is unknown without the gradient noise scale: pass it to "
        "PerformanceModel.",
    ),
    Row(
        lambda: PerformanceModel(STEP).best_batch(clients=2),
        ValueError,
        "max_batch=None: these steps take the same time for any batch, so the largest batch is the fastest: "
        "pass the largest one that fits to PerformanceModel.",
    ),
    Row(
        lambda: PerformanceModel(STEP).best_batch(clients=2, work_share=1),
        ValueError,
        "work_share=1: pass a share above 0 and below 1.",
    ),
    Row(
        lambda: PerformanceModel(STEP).time_per_round(0, clients=2),
        ValueError,
        "batch=0: pass a number above 0.",
    ),
]
