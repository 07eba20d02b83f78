"""The interface to Lightning's loops, hooks, loggers and checkpoints."""
