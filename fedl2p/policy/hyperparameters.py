"""A new client's hyperparameters by name, and whether the nets can know such a client."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedl2p.core.meta_nets import Hyperparameters, MetaNets
from fedl2p.core.statistics import ClientStatistics
from fedl2p.errors import ModelError

UNUSUAL = 5.0
"""How many standard deviations (of the seen clients) from their mean an input of the nets is called unusual."""


class UnusualClientWarning(UserWarning):
    """A client's statistics lie outside of what the nets were trained on, so their answer is a guess."""


@dataclass(frozen=True)
class NamedHyperparameters:
    """A client's recipe, by name.

    Attributes:
        beta: by batch-norm layer, how far it trusts the client's statistics, 0 to 1.
        eta: by parameter tensor, its learning rate; may be negative.
        unusual: inputs of the nets that are further than `UNUSUAL` from the seen clients' mean, with the distance in
            their standard deviations; the furthest first.
    """

    beta: Mapping[str, float]
    eta: Mapping[str, float]
    unusual: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, hyperparameters: Hyperparameters, nets: MetaNets, unusual: Mapping[str, float] | None = None
    ) -> "NamedHyperparameters":
        """Gives the entries of a recipe the names that `nets` have for them."""
        beta = dict(zip(nets.batchnorm_names, hyperparameters.beta.tolist(), strict=True))
        eta = dict(zip(nets.parameter_names, hyperparameters.eta.tolist(), strict=True))
        return cls(beta, eta, dict(unusual or {}))

    def vectors(self, nets: MetaNets) -> Hyperparameters:
        """The vectors beta (B,) and eta (P,) in the order, the type and on the device of `nets`.

        Raises:
            ModelError: a name is missing or unknown, with the first of them.
        """
        vectors = []
        for kind, own, names in (
            ("beta", self.beta, nets.batchnorm_names),
            ("eta", self.eta, nets.parameter_names),
        ):
            different = sorted(set(own) ^ set(names))
            if different:
                raise ModelError(
                    f"The {kind} of these hyperparameters are of another model; '{different[0]}' is one of "
                    f"{len(different)} names that differ."
                )
            vectors.append(nets.base_lr.detach().new_tensor([own[name] for name in names]))
        return Hyperparameters(*vectors)


def unusual_inputs(nets: MetaNets, statistics: ClientStatistics, *, bound: float = UNUSUAL) -> dict[str, float]:
    """The inputs of the nets in which a client is unlike the clients that they were trained on.

    Args:
        nets: with the mean and the standard deviation of their inputs over the seen clients; nets that read their
            inputs as they are (`meta_nets.standardize=false`) know no range, and nothing is unusual to them.
        statistics: the client's.
        bound: in standard deviations.

    Returns:
        By the name of the input, how many standard deviations it is from the mean; the furthest first.
    """
    xi, moments, count = (inputs.to(nets.base_lr) for inputs in statistics.net_inputs())
    found: dict[str, float] = {}
    moment_names = [f"{part} of the inputs of {name}" for name in nets.layer_names for part in ("mean", "SD")]
    for net, inputs, names in (
        (nets.bn_net, xi, [f"divergence at {name}" for name in nets.batchnorm_names]),
        (nets.lr_net, moments, moment_names),
    ):
        if net is None or _as_they_are(net.input_shift, net.input_scale):
            continue
        if nets.sample_count:
            inputs, names = torch.cat([inputs, count.log()[None]]), [*names, "logarithm of the number of samples"]
        distances = (net.transform(inputs) - net.input_shift) / net.input_scale
        found |= {name: d for name, d in zip(names, distances.tolist(), strict=True) if abs(d) > bound}
    return dict(sorted(found.items(), key=lambda item: -abs(item[1])))


def _as_they_are(shift: Tensor, scale: Tensor) -> bool:
    return not shift.any() and bool((scale == 1).all())


def describe_unusual(unusual: Mapping[str, float], *, shown: int = 3) -> str:
    """One sentence for a person."""
    names = ", ".join(f"{name} ({distance:+.0f} SD)" for name, distance in list(unusual.items())[:shown])
    return (
        f"This client is unlike the clients that the nets were trained on, in {len(unusual)} of their inputs: {names}"
        f"{', ...' if len(unusual) > shown else ''}. Their answer for it is a guess; the seen clients' mean recipe is "
        "the safer one."
    )
