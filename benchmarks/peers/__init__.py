"""Other simulators, each driven as its own documentation does; each module runs in an environment of its own."""
