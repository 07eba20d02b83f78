"""The engine: how one round runs."""
