"""Differential privacy of clients, its accounting, and secure aggregation."""
