"""Values of tables that are written as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def as_dict(value: Any) -> Mapping[str, Any] | None:
    """Read a mapping from JSON; None for anything else, such as a user's own column of the same name.

    Example:
        >>> as_dict('{"mode": "sync"}'), as_dict("strict"), as_dict(None)
        ({'mode': 'sync'}, None, None)
    """
    try:
        found = json.loads(value)
    except (TypeError, ValueError):
        return None
    return found if isinstance(found, dict) else None
