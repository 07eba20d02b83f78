"""Defining a device changes torch for the whole process, so these tests have processes of their own."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("FEDSCALE_SECOND_DEVICE") else ["test_*.py"]
