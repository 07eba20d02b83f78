"""What the user's Python code reads and writes besides tensors."""
