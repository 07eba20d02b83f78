"""Defining a device changes torch for the whole process, so these tests have processes of their own.

Nothing here is imported elsewhere, not even to look for examples in docstrings.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("FEDSCALE_SECOND_DEVICE") else ["*.py"]
