"""Hydra's config groups: a file for everything that a federation is made of, with all its arguments at their defaults.

The command ``fedscale train`` is composed of them, and any Hydra application can be, with
``hydra.searchpath=[pkg://lightning_fedscale.conf]``.
"""
