"""A trained pair of nets on disk: what a new client needs for its recipe, beside theta_g."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fedl2p.core.meta_nets import Hyperparameters, MetaNets
from fedl2p.core.settings import LearnerSettings
from fedl2p.errors import ConfigError, ModelError, RunFolderError
from fedl2p.io import checksum, read_tensors, write_tensors

META_NETS = "meta_nets.safetensors"
MEAN_RECIPE = "mean_recipe.safetensors"
"""Files in a run's folder."""

_NAMES = ("batchnorm_names", "layer_names", "parameter_names")
_OPTIONS = ("log_divergence", "sample_count")


@dataclass(frozen=True, eq=False)
class PolicyFile:
    """What a file of nets holds.

    Attributes:
        path: of the file.
        tensors: the nets' parameters and buffers, by name.
        names: `batchnorm_names`, `layer_names` and `parameter_names` that they fit.
        options: of `MetaNets`.
        settings: how clients learned.
        input_shape: of one sample; None where it is not known.
    """

    path: Path
    tensors: dict[str, Tensor]
    names: dict[str, tuple[str, ...]]
    options: dict[str, bool]
    settings: LearnerSettings
    input_shape: tuple[int, ...] | None

    def renamed(self, names: Mapping[str, str]) -> "PolicyFile":
        """The same for a model whose layers have other names.

        Args:
            names: from a layer (or a module with layers in it) here to its name in the other model; the longest one
                that fits a name counts.

        Raises:
            ModelError: nothing here has one of the names.
        """
        known = [name for own in self.names.values() for name in own]
        for old in names:
            if not any(_inside(name, old) for name in known):
                raise ModelError(f"The map of names has '{old}', but no layer of the nets in {self.path} is called so.")
        own = {kind: tuple(_renamed(name, names) for name in values) for kind, values in self.names.items()}
        return replace(self, names=own)

    def nets_for(self, model: nn.Module) -> MetaNets:
        """The nets, in the floating-point type and on the device of a model.

        Args:
            model: from `convert_batchnorm`.

        Raises:
            ModelError: they are for another model.
        """
        nets = MetaNets(model, **self.options)  # type: ignore[arg-type]  # their names are those of _OPTIONS
        nets = nets.to(next(model.parameters(), torch.zeros(())))
        for kind in _NAMES:
            stored, own = self.names[kind], getattr(nets, kind)
            different = sorted(set(stored) ^ set(own))[:3]
            if different:
                raise ModelError(
                    f"The nets in {self.path} are for another model; {kind} differ, among them {different}."
                )
            if stored != own:
                raise ModelError(f"The nets in {self.path} are for another model; {kind} come in another order.")
        try:
            nets.load_state_dict(self.tensors)
        except RuntimeError as error:
            raise ModelError(f"The nets in {self.path} do not fit: {error}") from error
        return nets


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _renamed(name: str, names: Mapping[str, str]) -> str:
    found = max((old for old in names if _inside(name, old)), key=len, default=None)
    return name if found is None else names[found] + name.removeprefix(found)


def policy_metadata(
    meta_nets: MetaNets, *, settings: LearnerSettings | None = None, input_shape: Sequence[int] | None = None
) -> dict[str, str]:
    """What a file of nets says about them: the layers that they fit, and how their inputs are prepared.

    Args:
        meta_nets: the nets.
        settings: how clients learned, and a new one fine-tunes.
        input_shape: of one sample.
    """
    result = {key: json.dumps(list(getattr(meta_nets, key))) for key in _NAMES}
    log_divergence = meta_nets.bn_net is not None and meta_nets.bn_net.log_inputs
    result |= {"log_divergence": json.dumps(log_divergence), "sample_count": json.dumps(meta_nets.sample_count)}
    if settings is not None:
        result["settings"] = json.dumps(settings.as_dict())
    if input_shape is not None:
        result["input_shape"] = json.dumps(list(input_shape))
    return result


def write_policy(
    path: Path,
    meta_nets: MetaNets,
    lambda_: Mapping[str, Tensor],
    *,
    settings: LearnerSettings,
    input_shape: Sequence[int] | None = None,
    recipes: Sequence[Hyperparameters] = (),
) -> None:
    """Writes the nets, and beside them the mean recipe of the clients that they were learned with.

    Args:
        path: a `meta_nets.safetensors`.
        meta_nets: the structure of the nets, and the standardization of their inputs.
        lambda_: their parameters, by name.
        settings: how clients learned.
        input_shape: of one sample.
        recipes: of the seen clients; none leaves the mean recipe out.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    metadata = policy_metadata(meta_nets, settings=settings, input_shape=input_shape)
    tensors = dict(meta_nets.named_buffers()) | dict(lambda_)
    write_tensors(path, tensors, metadata | {"checksum": checksum(tensors, metadata)})
    if recipes:
        mean = {name: torch.stack([getattr(recipe, name) for recipe in recipes]).mean(0) for name in ("beta", "eta")}
        names = {key: metadata[key] for key in ("batchnorm_names", "parameter_names")}
        write_tensors(path.with_name(MEAN_RECIPE), mean, names | {"checksum": checksum(mean, names)})


def read_policy(path: Path) -> PolicyFile:
    """Reads a file of nets and checks it as a whole.

    Args:
        path: a `meta_nets.safetensors`.

    Raises:
        ModelError: the file cannot be read, was cut off, or is not what was written.
    """
    tensors, metadata = _read(path)
    shape = metadata.get("input_shape")
    try:
        settings = LearnerSettings.of(**json.loads(metadata["settings"])) if "settings" in metadata else None
        return PolicyFile(
            path=path,
            tensors=tensors,
            names={key: tuple(map(str, json.loads(metadata[key]))) for key in _NAMES},
            options={key: bool(json.loads(metadata.get(key, "false"))) for key in _OPTIONS},
            settings=settings or LearnerSettings(),
            input_shape=None if shape is None else tuple(map(int, json.loads(shape))),
        )
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"The nets cannot be read. What {path} says of them is damaged ({error!r}).") from error


def read_mean_recipe(path: Path) -> tuple[dict[str, float], dict[str, float]] | None:
    """The mean recipe of the seen clients, beta and eta by name; None where there is none.

    Args:
        path: a `mean_recipe.safetensors`.

    Raises:
        ModelError: as `read_policy`.
    """
    if not path.exists():
        return None
    tensors, metadata = _read(path)
    try:
        beta, eta = (
            dict(zip(json.loads(metadata[names]), tensors[values].tolist(), strict=True))
            for names, values in (("batchnorm_names", "beta"), ("parameter_names", "eta"))
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"The mean recipe in {path} is damaged ({error!r}).") from error
    return beta, eta


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors, metadata = read_tensors(path)
    except RunFolderError as error:
        raise ModelError(f"The nets cannot be read. {error}") from error
    if "checksum" in metadata and metadata["checksum"] != checksum(tensors, metadata):
        raise ModelError(f"The nets cannot be read. The file {path} is not as it was written: its checksum differs.")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ModelError(f"The nets cannot be read. In {path}, '{broken[0]}' has values that are not finite.")
    return tensors, metadata


def load_policy(path: Path, model: nn.Module) -> MetaNets:
    """Loads nets for a model.

    Args:
        path: a `meta_nets.safetensors` of a run's folder.
        model: from `convert_batchnorm`.

    Raises:
        ModelError: the file cannot be read, or its nets are for another model.
    """
    return read_policy(path).nets_for(model)
