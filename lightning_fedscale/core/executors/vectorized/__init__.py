"""The vectorized executor: many clients in one batched step."""
