"""The checked arguments of FederatedStrategy."""
