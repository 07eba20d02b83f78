"""How fast this machine runs operators: measured once and kept, so that all runs decide by the same numbers."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

_VERSION: Final = 1  # of what is measured; constants of other versions are not read
_REPEATS: Final = 200


class Machine(NamedTuple):
    """The speed of a device, and of the Python process that drives it.

    Attributes:
        launch: seconds to call an elementwise operator on a few numbers, forward and backward.
        flop: seconds of a floating-point operation in a product of two large matrices.
        byte: seconds to read or write a byte in an addition of long vectors.
        overlaps: whether operators run while the next ones are called.
        source: where the numbers come from, for messages.
    """

    launch: float
    flop: float
    byte: float
    overlaps: bool = False
    source: str = "built-in constants"

    def seconds(self, launches: float, flops: float, moved: float) -> float:
        """Return the time of so many calls, floating-point operations and bytes."""
        called, worked = launches * self.launch, flops * self.flop + moved * self.byte
        return max(called, worked) if self.overlaps else called + worked


# CPU: a server's core of 2023. CUDA: the data sheet of a data-center device, not measured.
BUILT_IN: Final = {
    "cpu": Machine(2.4e-6, 6.2e-12, 3.6e-11),
    "cuda": Machine(2.4e-6, 2e-14, 5e-13, overlaps=True),
}


def machine_of(device: torch.device) -> Machine:
    """Return this machine's constants: those that are kept, or measured now and then kept, or those built in.

    They are measured only if they can be kept: no two measurements are equal, and runs would choose differently.
    """
    if (built_in := BUILT_IN.get(device.type)) is None:  # it works while the next operators are called, as CUDA does
        return BUILT_IN["cuda"]._replace(source=f"built-in constants, since {device.type!r} devices are not measured")
    described = _description(device)
    try:
        path = cache_folder() / f"machine-{_digest(described)}.json"
        if not path.exists():
            _keep(path, described, lambda: measured(device))
        return _read(path, described, built_in)
    except (OSError, ValueError, RuntimeError) as error:
        return built_in._replace(source=f"built-in constants, since those of this machine cannot be kept: {error}")


def cache_folder() -> Path:
    """Return the folder in which this user's constants are kept.

    Raises:
        RuntimeError: if the user has no home.
    """
    caches = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path is to be ignored (XDG Base Directory Specification): it would be another folder in each directory.
    return (Path(caches) if os.path.isabs(caches) else Path.home() / ".cache") / "lightning_fedscale"


def measured(device: torch.device) -> Machine:
    """Measure the constants, in some tenths of a second."""
    large = device.type == "cuda"
    options: dict[str, Any] = {"device": device, "dtype": torch.float32}
    few = torch.ones(8, 8, **options, requires_grad=True)
    matrix, product = (torch.ones(4096 if large else 256, 4096 if large else 256, **options) for _ in range(2))
    one, other, total = (torch.ones(2**26 if large else 2**18, **options) for _ in range(3))

    def chain() -> None:
        result = few
        for _ in range(10):
            result = result * result + few
        result.sum().backward()  # type: ignore[no-untyped-call]
        few.grad = None

    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        launch = _quickest(chain, device) / 62  # operators, those of the backward pass included
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        flop = _quickest(lambda: torch.mm(matrix, matrix, out=product), device) / (2 * len(matrix) ** 3)
        byte = _quickest(lambda: torch.add(one, other, out=total), device) / (3 * total.nbytes)
    return Machine(launch, flop, byte, overlaps=large)


def _quickest(run: Callable[[], object], device: torch.device) -> float:
    """Return the least time of several runs: other processes only ever add to it."""
    seconds = []
    for _ in range(_REPEATS):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _description(device: torch.device) -> dict[str, Any]:
    """Describe everything on which the constants depend; no name of a host, since equal nodes should decide alike."""
    return {
        "version": _VERSION,
        "processor": processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:2])),
    }


def processor() -> str:
    """Return the name of the CPU."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    except OSError:
        found = None
    return found[1] if found else f"{platform.machine()} {platform.processor()}".strip()


def _digest(described: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _keep(path: Path, described: dict[str, Any], measure: Callable[[], Machine]) -> None:
    """Write the constants completely or not at all; of several processes the first one to finish is believed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", encoding="utf-8") as file:
        machine = measure()
        constants = {"launch": machine.launch, "flop": machine.flop, "byte": machine.byte}
        json.dump({"machine": described, "seconds": constants}, file, indent=2)
        file.flush()
        try:
            os.link(file.name, path)  # unlike a renamed file, a link never replaces what another process has written
        except FileExistsError:
            return


def _read(path: Path, described: dict[str, Any], built_in: Machine) -> Machine:
    """Return the constants in a file.

    Raises:
        ValueError: if it is broken, or of another machine.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["machine"] != described:
            raise ValueError("it describes another machine")
        launch, flop, byte = (float(kept["seconds"][name]) for name in ("launch", "flop", "byte"))
        if not all(0 < seconds < 1 for seconds in (launch, flop, byte)):
            raise ValueError("its times are invalid")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is broken ({error}); delete it") from error
    return Machine(launch, flop, byte, built_in.overlaps, f"constants of this machine, kept in {path}")
