"""Many clients in one batched step."""
