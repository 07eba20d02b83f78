"""What meets Lightning's loops, hooks, loggers and checkpoints."""
