"""Docstrings as browsers show them: formulas as MathML, which needs no script, and other roles as plain code."""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

INLINE = re.compile(r":math:`([^`]+)`")
ROLE = re.compile(r":(?:attr|class|func|meth):`~?([^`]+)`")
EXAMPLE = re.compile(r"^( *)Example:$", re.M)
BLOCK = re.compile(r"^( *)\.\. math::[ \n]+((?:(?!\n *\n)[\s\S])+)", re.M)


def readable(text: str) -> str:
    """A docstring in Markdown.

    Example:
        >>> readable("the mean :math:`x` of :class:`~torch.Tensor`")
        'the mean <math xmlns="http://www.w3.org/1998/Math/MathML" display="inline"><mrow><mi>x</mi></mrow></math> of `torch.Tensor`'
    """
    text = BLOCK.sub(lambda found: f"{found[1]}{_mathml(found[2], 'block')}", text)
    text = INLINE.sub(lambda found: _mathml(found[1], "inline"), text)
    text = EXAMPLE.sub(r"\1Examples:", text)  # the only heading under which griffe looks for >>>
    return ROLE.sub(r"`\1`", text)


def _mathml(formula: str, display: str) -> str:
    return str(convert(" ".join(formula.split()), display=display))


class Formulas(griffe.Extension):
    """Makes every docstring of the package readable, once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Walk through all that the package has."""
        _walk(pkg)


def _walk(thing: griffe.Object) -> None:
    if thing.docstring is not None:
        thing.docstring.value = readable(thing.docstring.value)
    for member in thing.members.values():
        if isinstance(member, griffe.Object):
            _walk(member)
