"""Who has what data: clients in pools, ways to divide a data set among them, and one file a data set."""

from datamodules.digits import DigitsDataModule
from datamodules.federated import POOLS, ClientData, ClientDataModule, FederatedDataModule

__all__ = ["POOLS", "ClientData", "ClientDataModule", "DigitsDataModule", "FederatedDataModule"]
