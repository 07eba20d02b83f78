"""Lightning's own tests as a check: their Trainers train by `FederatedStrategy`, see ``__main__``."""
