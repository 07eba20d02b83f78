"""The law that an argument ``law=`` names, which may be the project's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_fedscale.scaling.base import Law
from lightning_fedscale.scaling.chinchilla import Chinchilla
from lightning_fedscale.scaling.fit import law_from_file
from lightning_fedscale.scaling.registry import LAW_FILE, law_by_name

LEVELS = (1 / 16, 1 / 4, 1.0)
"""Fractions of the compute that a sweep trains with, since a law of size and data needs several amounts of both."""


def project_law(folder: str | Path = ".") -> tuple[Law, float | None] | None:
    """Return the law that was fitted to the project's own runs, and ``rho``; None without ``fedscale_law.json``."""
    path = Path(folder, LAW_FILE)
    return law_from_file(path) if path.is_file() else None


def law_of(law: Any, *, text: bool) -> tuple[Law | None, float | None]:
    """Return the law that an argument names, and the ``rho`` that was fitted with it, if any.

    Args:
        law: "auto", a law's name, a file of `Fit.save`, a law, or None for no law. "auto" is the project's own law if
            there is one, else `Chinchilla` for text, else no law, since no published law holds for other tasks.
        text: whether the task is text.

    Raises:
        Unfitted: for a law without constants.
        ValueError: for an unknown name or a file without a law.
        TypeError: for any other type.

    Example:
        >>> law_of("kaplan", text=True)[0].name
        'Kaplan'
        >>> law_of("auto", text=False)
        (None, None)
    """
    if law is None:
        return None, None
    if isinstance(law, Law):
        law.check()
        return law, None
    if not isinstance(law, (str, Path)):
        raise TypeError(f"law={law!r}: pass 'auto', a law's name, a file of Fit.save, a law, or None.")
    if law == "auto":
        return project_law() or (Chinchilla() if text else None, None)
    if Path(law).suffix == ".json":
        return law_from_file(law)
    found = law_by_name(str(law))
    found.check()
    return found, None


def needed_law(law: Any) -> Law:
    """Return the law that an argument names, as `law_of` does for text; None is invalid.

    Raises:
        Unfitted, ValueError, TypeError: as `law_of`; ValueError also for None.
    """
    found, _ = law_of(law, text=True)
    if found is None:
        raise ValueError(
            "law=None: pass a law, its name, or a file of Fit.save, such as the one that fedscale sweep writes."
        )
    return found


def sweep_command(
    module: str | None,
    data: str | None,
    flops: float,
    argument: str = "size",
    sizes: Sequence[int] = (8, 16, 32, 64, 128),
    more: Sequence[str] = ("--clients '[1,4]'",),
) -> str:
    """Return the command for the smallest sweep of a module that a law can be fitted to.

    Args:
        module: path of the module's class; None for a placeholder.
        data: path of the data module's class; None for a placeholder.
        flops: compute of the largest runs.
        argument: the module's argument that sets its size.
        sizes: values of the argument.
        more: further flags, for clients, partition, and the arguments of module and data.

    Example:
        >>> sweep_command("my.Module", "my.Data", 2.5e9)
        "fedscale sweep --module my.Module --data my.Data --sizes '[8,16,32,64,128]' --flops 2.5e+09 --clients '[1,4]'"
    """
    made = f"--module {module or 'my_package.MyModule'} --data {data or 'my_package.MyDataModule'}"
    named = [] if argument == "size" else [f"--argument {argument}"]
    listed = ",".join(map(str, sizes))
    return " ".join(["fedscale sweep", made, f"--sizes '[{listed}]'", f"--flops {flops:.2g}", *named, *more])
