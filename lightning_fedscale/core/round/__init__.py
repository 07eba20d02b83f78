"""One round, in the order in which it runs."""
