"""The content of the reference: public names at their import paths, and docstrings as browsers show them."""

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
    """Convert a docstring to Markdown.

    Example:
        >>> readable("the mean :math:`x` of :class:`~torch.Tensor`")
        'the mean <span><math ...<mi>x</mi>...</math></span> of `torch.Tensor`'
    """
    text = BLOCK.sub(lambda found: f"{found[1]}{_mathml(found[2], 'block')}", text)
    text = INLINE.sub(lambda found: _mathml(found[1], "inline"), text)
    text = EXAMPLE.sub(r"\1Examples:", text)  # the only heading under which griffe looks for >>>
    return ROLE.sub(r"`\1`", text)


def _mathml(formula: str, display: str) -> str:
    made = str(convert(" ".join(formula.split()), display=display))
    return made if display == "block" else f"<span>{made}</span>"  # else Markdown makes a paragraph of it


class Public(griffe.Extension):
    """Change the loaded package: formulas become MathML, and each room owns its public objects.

    A room's function may have the name of the file that it is in (`server.fed_avg`): in the room that name is the
    function, and griffe would take it for the file.
    """

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Change all objects of the package."""
        _walk(pkg)
        rooms = [room for room in pkg.members.values() if isinstance(room, griffe.Module) and room.exports]
        found = {(room.path, str(name)): _object(room, str(name)) for room in rooms for name in room.exports or ()}
        for room in rooms:
            for name in map(str, room.exports or ()):
                if (thing := found[room.path, name]) is not None:
                    room.members[name] = thing
                    thing.parent = room


def _walk(thing: griffe.Object) -> None:
    if thing.docstring is not None:
        thing.docstring.value = readable(thing.docstring.value)
    for member in thing.members.values():
        if isinstance(member, griffe.Object):
            _walk(member)


def _object(module: griffe.Module, name: str) -> griffe.Object | None:
    """Return the object of a name that a module imports; None if it belongs to another package."""
    member = module.members.get(name)
    if isinstance(member, griffe.Alias):
        home, _, original = member.target_path.rpartition(".")
        try:
            origin = module.package if home == module.package.path else module.package[home.partition(".")[2]]
        except KeyError:
            return None
        return _object(origin, original) if isinstance(origin, griffe.Module) else None
    if isinstance(member, griffe.Module):
        return _object(member, name) if name in member.members else None
    return member
