"""Who has what data: clients in pools, ways to divide a data set among them, and one file a data set."""

from datamodules.base.federated import POOLS, ClientData, ClientDataModule, FederatedDataModule
from datamodules.cifar10 import CIFAR10DataModule
from datamodules.cifar10c import CIFAR10CDataModule
from datamodules.digits import DigitsDataModule
from datamodules.digits_two_domains import DigitsTwoDomainsDataModule
from datamodules.domainnet import DomainNetDataModule
from datamodules.femnist import FEMNISTDataModule
from datamodules.image_folder import ImageFolderDataModule
from datamodules.office_caltech10 import OfficeCaltech10DataModule
from datamodules.speech_commands import SpeechCommandsDataModule
from datamodules.tensors import TensorsDataModule

__all__ = [
    "POOLS",
    "CIFAR10CDataModule",
    "CIFAR10DataModule",
    "ClientData",
    "ClientDataModule",
    "DigitsDataModule",
    "DigitsTwoDomainsDataModule",
    "DomainNetDataModule",
    "FEMNISTDataModule",
    "FederatedDataModule",
    "ImageFolderDataModule",
    "OfficeCaltech10DataModule",
    "SpeechCommandsDataModule",
    "TensorsDataModule",
]
