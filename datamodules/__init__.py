"""Who has what data: clients in pools, ways to divide a data set among them, and one file a data set."""

from fedl2p.datamodules.base.federated import ClientData, ClientDataModule, FederatedDataModule
from fedl2p.datamodules.base.split import Split
from fedl2p.datamodules.cifar10 import CIFAR10DataModule
from fedl2p.datamodules.cifar10c import CIFAR10CDataModule
from fedl2p.datamodules.digits import DigitsDataModule
from fedl2p.datamodules.digits_two_domains import DigitsTwoDomainsDataModule
from fedl2p.datamodules.domainnet import DomainNetDataModule
from fedl2p.datamodules.femnist import FEMNISTDataModule
from fedl2p.datamodules.image_folder import ImageFolderDataModule
from fedl2p.datamodules.office_caltech10 import OfficeCaltech10DataModule
from fedl2p.datamodules.speech_commands import SpeechCommandsDataModule
from fedl2p.datamodules.tensors import TensorsDataModule
from fedl2p.pools import POOLS

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
    "Split",
    "TensorsDataModule",
]

if __name__ == "datamodules":  # in a clone, by the folder's own name
    from fedl2p._aliases import make_alias

    make_alias(__name__, "fedl2p.datamodules")
