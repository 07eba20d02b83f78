"""Profiling of a module's training step in a dry run on fake tensors."""
