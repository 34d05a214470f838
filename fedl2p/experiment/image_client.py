"""A folder of images as the data of one new client, read and normalized as the run's own images were."""

from collections.abc import Sequence
from pathlib import Path

from fedl2p.datamodules.base.arrays import ArrayDataset, Arrays
from fedl2p.datamodules.base.client import ClientData, ClientDataModule
from fedl2p.datamodules.base.image_domains import ImageDomainsDataModule, class_samples, subfolders
from fedl2p.datamodules.io.images import image_files
from fedl2p.errors import ConfigError, DataError, RunFolderError
from fedl2p.experiment.build import instantiate
from fedl2p.experiment.schema import Config
from fedl2p.io import read_json
from fedl2p.pools import ROLES


def image_client(folder: Path, config: Config, run: Path) -> ClientDataModule:
    """The client in a folder.

    Args:
        folder: `<class>/<image>`, all of them for training; or `train/<class>/<image>`, with `val` and `test` beside it
            where there are such data.
        config: of the run, whose data are images too.
        run: the run's folder, which knows the names of the classes.

    Raises:
        ConfigError: the run's data are no image files, so that nobody knows how to read them.
        DataError: the folder holds no images, a class that the run does not know, or an image that cannot be read.
        RunFolderError: the run has not kept the names of its classes.
    """
    images = instantiate(config.data, "data", kind=object)
    if not isinstance(images, ImageDomainsDataModule):
        raise ConfigError(
            f"--data '{folder}' is a folder, but the run's data ({config.data.class_path}) are no image files; give a "
            "configuration whose data are read as the run's were."
        )
    classes = _classes(run)
    arrays = {role: _read(images, root, classes) for role, root in _roots(folder).items()}

    def dataset(role: str) -> ArrayDataset:
        if role not in arrays:
            return ArrayDataset(arrays["train"], [])
        return ArrayDataset(arrays[role], augmentation=images.augmentation)

    name = folder.resolve().name
    client = ClientData(name=name, pool="unseen", train=dataset("train"), val=dataset("val"), test=dataset("test"))
    return ClientDataModule(client, batch_size=images.batch_size, seed=config.seed)


def _classes(run: Path) -> list[str]:
    record = read_json(run / "clients.json")
    classes = record.get("classes") if isinstance(record, dict) else None
    if not classes:
        raise RunFolderError(f"The run in '{run}' has not kept the names of its classes (clients.json).")
    return [str(name) for name in classes]


def _roots(folder: Path) -> dict[str, Path]:
    """By role, where the class folders lie."""
    if (folder / "train").is_dir() and not image_files(folder / "train"):
        return {role: folder / role for role in ROLES if (folder / role).is_dir()}
    return {"train": folder}


def _read(images: ImageDomainsDataModule, root: Path, classes: Sequence[str]) -> Arrays:
    found = {path.name: path for path in subfolders(root)}
    unknown = [name for name in found if name not in classes]
    if unknown:
        raise DataError(f"{root} has the class '{unknown[0]}'; the run knows {', '.join(classes)}.")
    samples = class_samples([found.get(name) for name in classes])
    if not len(samples):
        raise DataError(f"{root} holds no images in <class>/ folders.")
    return Arrays(images.read(samples.keys), samples.labels, mean=images.mean, std=images.std)
