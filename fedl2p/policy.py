"""A trained pair of nets on disk: what a new client needs for its recipe, beside theta_g."""

import json
from pathlib import Path

from torch import nn

from fedl2p.core.meta_nets import MetaNets
from fedl2p.errors import ModelError, RunFolderError
from fedl2p.io import read_tensors

_NAMES = ("batchnorm_names", "layer_names", "parameter_names")


def policy_metadata(meta_nets: MetaNets) -> dict[str, str]:
    """What a file of nets says about them: the layers that they fit, and how their inputs are prepared."""
    names = {key: json.dumps(list(getattr(meta_nets, key))) for key in _NAMES}
    log_divergence = meta_nets.bn_net is not None and meta_nets.bn_net.log_inputs
    return names | {"log_divergence": json.dumps(log_divergence), "sample_count": json.dumps(meta_nets.sample_count)}


def load_policy(path: Path, model: nn.Module) -> MetaNets:
    """Loads nets for a model.

    Args:
        path: a `meta_nets.safetensors` of a run's folder.
        model: from `convert_batchnorm`.

    Raises:
        ModelError: the file cannot be read, or its nets are for another model.
    """
    try:
        tensors, metadata = read_tensors(path)
    except RunFolderError as error:
        raise ModelError(f"The nets cannot be read. {error}") from error
    options = {key: json.loads(metadata.get(key, "false")) for key in ("log_divergence", "sample_count")}
    nets = MetaNets(model, **options)
    for key in _NAMES:
        stored = json.loads(metadata.get(key, "[]"))
        if stored != list(getattr(nets, key)):
            different = sorted(set(stored) ^ set(getattr(nets, key)))[:3]
            raise ModelError(f"The nets in {path} are for another model; {key} differ, among them {different}.")
    try:
        nets.load_state_dict(tensors)
    except RuntimeError as error:
        raise ModelError(f"The nets in {path} do not fit: {error}") from error
    return nets
