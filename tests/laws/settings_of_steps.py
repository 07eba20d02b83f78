"""A module of values that `test_captured_steps` has training steps read, and changes from outside."""

import types

RATE = 1.0
CONFIG = types.SimpleNamespace(loss={"rate": [1.0]})
