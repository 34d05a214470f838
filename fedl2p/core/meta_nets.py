"""BNNet and LRNet: from a client's statistics to its hyperparameters (Eq. 4, Appendix E of the FedL2P paper)."""

from enum import StrEnum
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedl2p.core.batchnorm import batchnorm_names
from fedl2p.core.settings import word
from fedl2p.core.statistics import ClientStatistics, learnable_layer_names
from fedl2p.errors import ConfigError, ModelError

BETA_RANGE = (0.0, 1.0)
MULTIPLIER_RANGE = (0.0, 1000.0)
HIDDEN_UNITS = 100


class Hyperparameters(NamedTuple):
    """A client's recipe.

    Attributes:
        beta: how far each batch-norm layer trusts the client's statistics, shape (B,).
        eta: the learning rate of each parameter tensor, shape (P,); may be negative.
    """

    beta: Tensor
    eta: Tensor


class _StraightThroughClamp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, low: float, high: float) -> Tensor:
        return values.clamp(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is needed by the backward pass."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        # A view of the input would be taken for the input itself.
        return tangents[0].clone()


def straight_through_clamp(values: Tensor, low: float, high: float) -> Tensor:
    """Clamps to [low, high]; the gradient passes as if it had not (Appendix E)."""
    return _StraightThroughClamp.apply(values, low, high)


class Initialization(StrEnum):
    """How the weights of the nets are drawn."""

    paper = "paper"
    """Xavier-normal weights of gain 0.1 in all layers, and all biases the first output (Appendix E): a change of the
    inputs then reaches the outputs a thousandfold weakened."""
    responsive = "responsive"
    """He-normal weights and zero biases in the hidden layers, and a last layer as in the paper."""


class MetaNet(nn.Module):
    """Three linear layers with ReLU between, 100 hidden units, and a straight-through clamp at the end.

    Inputs are `(transform(x) - input_shift) / input_scale`, where `transform` is log1p if `log_inputs` and nothing
    otherwise; the shift is 0 and the scale 1, that is the paper's raw inputs, until `MetaNets.standardize` sets them.

    Attributes:
        input_shift: shape (inputs,).
        input_scale: shape (inputs,).
    """

    input_shift: Tensor
    input_scale: Tensor

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        *,
        initial_output: float,
        output_range: tuple[float, float],
        initialization: Initialization = Initialization.responsive,
        log_inputs: bool = False,
    ) -> None:
        """Builds the network.

        Args:
            num_inputs: length of the statistics vector.
            num_outputs: length of the hyperparameter vector.
            initial_output: about what the untrained net answers for every client.
            output_range: the lowest and the highest output; what lies outside is clamped.
            initialization: of the weights and biases.
            log_inputs: compress the (non-negative) inputs by log1p.
        """
        super().__init__()
        widths = [num_inputs, HIDDEN_UNITS, HIDDEN_UNITS, num_outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.output_range = output_range
        self.log_inputs = log_inputs
        self.register_buffer("input_shift", torch.zeros(num_inputs))
        self.register_buffer("input_scale", torch.ones(num_inputs))
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            if initialization is Initialization.paper or index == 2:
                nn.init.xavier_normal_(layer.weight, gain=0.1)
                nn.init.constant_(layer.bias, initial_output)
            else:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def transform(self, inputs: Tensor) -> Tensor:
        """What is standardized: the inputs or their log1p, same shape."""
        return torch.log1p(inputs) if self.log_inputs else inputs

    def forward(self, inputs: Tensor) -> Tensor:
        """From (..., inputs) to (..., outputs), clamped."""
        hidden = (self.transform(inputs) - self.input_shift) / self.input_scale
        for layer in self.layers[:-1]:
            hidden = torch.relu(layer(hidden))
        return straight_through_clamp(self.layers[-1](hidden), *self.output_range)


class MetaNets(nn.Module):
    """lambda = {w_bn, w_lr, eta~}: what travels between the clients and the server.

    Attributes:
        bn_net: BNNet, from xi (B,) to beta (B,); None for a model without batch norm.
        lr_net: LRNet, from the layer moments (2M,) to multipliers (P,).
        base_lr: eta~, shape (P,); learned, of either sign.
        batchnorm_names: the B layers that beta speaks of.
        layer_names: the M layers that the moments speak of.
        parameter_names: the P tensors that eta speaks of.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        base_lr: float = 1e-3,
        initialization: Initialization | str = Initialization.responsive,
        log_divergence: bool = True,
        initial_beta: float = 0.5,
        sample_count: bool = False,
    ) -> None:
        """Builds the nets that fit `model`.

        Args:
            model: a model from `convert_batchnorm`.
            base_lr: the initial value of every eta~; the rate that plain fine-tuning prefers (Appendix D).
            initialization: see `Initialization`; its plain word will do.
            log_divergence: feed BNNet with log1p(xi), since xi grows with the square of a shift.
            initial_beta: about what BNNet answers before it is trained.
            sample_count: feed both nets with log N_i too, after the inputs of Eq. 4; the paper's conclusion names the
                number of samples as a further input.

        Raises:
            ConfigError: an unknown `initialization`, or an `initial_beta` outside [0, 1].
            ModelError: the model has no parameters.
        """
        super().__init__()
        initialization = word(Initialization, initialization, "initialization")
        if not 0 <= initial_beta <= 1:
            raise ConfigError(f"initial_beta is {initial_beta}; allowed is 0 to 1.")
        self.batchnorm_names = batchnorm_names(model)
        self.layer_names = learnable_layer_names(model)
        self.parameter_names = tuple(name for name, _ in model.named_parameters())
        if not self.parameter_names:
            raise ModelError("The model has no parameters, so there is nothing to fine-tune.")
        self.sample_count = sample_count
        num_bn, extra = len(self.batchnorm_names), int(sample_count)
        self.bn_net: MetaNet | None = None
        if num_bn:
            self.bn_net = MetaNet(
                num_bn + extra,
                num_bn,
                initial_output=initial_beta,
                output_range=BETA_RANGE,
                initialization=initialization,
                log_inputs=log_divergence,
            )
        self.lr_net = MetaNet(
            2 * len(self.layer_names) + extra,
            len(self.parameter_names),
            initial_output=1.0,
            output_range=MULTIPLIER_RANGE,
            initialization=initialization,
        )
        self.base_lr = nn.Parameter(torch.full((len(self.parameter_names),), float(base_lr)))

    def forward(
        self, bn_divergence: Tensor, layer_moments: Tensor, num_samples: Tensor | None = None
    ) -> Hyperparameters:
        """Answers with a client's recipe (Eq. 4).

        Args:
            bn_divergence: xi, shape (..., B).
            layer_moments: shape (..., 2M).
            num_samples: N_i, shape (...), of a floating-point type; needed with `sample_count` only.

        Returns:
            beta (..., B) and eta (..., P).
        """
        # A recipe is a handful of numbers that everything depends on: half precision is not for it.
        with torch.autocast(layer_moments.device.type, enabled=False):
            beta = bn_divergence if self.bn_net is None else self.bn_net(self._with_count(bn_divergence, num_samples))
            multiplier = self.lr_net(self._with_count(layer_moments, num_samples))
        return Hyperparameters(beta=beta, eta=multiplier * self.base_lr)

    def _with_count(self, inputs: Tensor, num_samples: Tensor | None) -> Tensor:
        if not self.sample_count:
            return inputs
        if num_samples is None:
            raise ModelError("These nets read the number of samples too (sample_count); pass num_samples.")
        return torch.cat([inputs, num_samples.log()[..., None]], -1)

    def recipe(self, statistics: ClientStatistics) -> Hyperparameters:
        """`forward` for one client, without a gradient: all that a new client needs."""
        with torch.no_grad():
            return self(*(inputs.to(self.base_lr) for inputs in statistics.net_inputs()))

    @torch.no_grad()
    def standardize(self, bn_divergence: Tensor, layer_moments: Tensor, num_samples: Tensor | None = None) -> None:
        """Sets shift and scale of both nets to mean and SD over clients, so that every input counts alike.

        An input that does not vary between clients gets the scale 1.

        Args:
            bn_divergence: xi of several clients, shape (clients, B).
            layer_moments: of the same clients, shape (clients, 2M).
            num_samples: of the same clients, shape (clients,); needed with `sample_count` only.
        """
        for net, inputs in ((self.bn_net, bn_divergence), (self.lr_net, layer_moments)):
            if net is None:
                continue
            values = net.transform(self._with_count(inputs, num_samples)).to(torch.float64)
            scale = values.std(0, correction=0)
            constant = scale <= 1e-6 * values.abs().mean(0)
            net.input_shift.copy_(values.mean(0))
            net.input_scale.copy_(torch.where(constant, torch.ones_like(scale), scale))
