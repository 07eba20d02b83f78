"""The Python state that the user's code reads and writes besides tensors."""
