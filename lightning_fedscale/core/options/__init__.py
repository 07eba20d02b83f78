"""What FederatedStrategy was asked for, checked."""
