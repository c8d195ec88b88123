"""FedCoE: federated coordinated dual-level mixtures of experts."""

__version__ = "0.1.0"
