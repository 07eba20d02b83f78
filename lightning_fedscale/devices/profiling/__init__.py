"""A module's step, run without its tensors."""
