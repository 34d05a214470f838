"""The keys of a configuration, their defaults and their meaning (`fedl2p keys`). Nothing heavy is imported."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fedl2p.core.settings import LearnerSettings, RefinementSettings


@dataclass
class ComponentConfig:
    """A class by its import path, and its keyword arguments.

    Attributes:
        class_path: import path of the class, or of a function that makes the object, as `package.module.Name`.
        init_args: keyword arguments of that class.
    """

    class_path: str = "???"
    init_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class PretrainingConfig:
    """How the global model is made: by FedAvg on a pool of clients, or from a file of weights.

    Attributes:
        weights: a file of weights (.safetensors or .pt), in which case nothing is pretrained.
        pool: the clients that train the global model, `pretrain` or `seen` (as in the paper's CIFAR-10).
        rounds: how many rounds of FedAvg; 0 leaves the model as its class makes it.
        client_fraction: part of the pool that trains in a round, above 0 and at most 1.
        epochs: passes over its own data that a client makes in a round.
        lr: learning rate of the clients' SGD.
        lr_drops: rounds from which on the learning rate is a tenth of what it was.
        momentum: momentum of the clients' SGD, from 0 to below 1.
    """

    weights: str | None = None
    pool: str = "pretrain"
    rounds: int = 40
    client_fraction: float = 1.0
    epochs: int = 1
    lr: float = 0.1
    lr_drops: list[int] = field(default_factory=list)
    momentum: float = 0.9


class ValidationLoss(StrEnum):
    """What the nets lower."""

    cross_entropy = "cross_entropy"
    expected_error = "expected_error"


@dataclass(frozen=True)
class ClientConfig(LearnerSettings):
    """The client's side of Algorithm 1.

    Attributes:
        validation_loss: what the nets lower and everything is selected by: `cross_entropy`, or `expected_error`, the
            mean probability of a wrong answer.
        compile: whether inner steps of clients that go one by one are compiled by torch: a minute or more a shape, and
            not faster on a CPU.
    """

    validation_loss: ValidationLoss = ValidationLoss.cross_entropy
    compile: bool = False


@dataclass
class HypergradientConfig:
    """The estimator of the hypergradient and its arguments.

    Attributes:
        name: the estimator: `unrolled` (exact, through the steps of fine-tuning), `fomaml` (first order) or `ift`
            (implicit differentiation, as in the paper).
        init_args: keyword arguments of the estimator's class, as {steps: 10} for `unrolled`.
    """

    name: str = "unrolled"
    init_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class MetaNetsConfig:
    """How the two networks are built, BNNet for beta and LRNet for eta.

    Attributes:
        base_lr: the learning rate that LRNet's outputs multiply at the start; null takes the best rate that the search
            for plain fine-tuning finds.
        initialization: how the networks' weights are drawn: `paper`, where a client's statistics hardly change the
            recipe at first, or `responsive`, where they do from the first round on.
        log_divergence: whether BNNet reads the logarithm of the divergences.
        standardize: whether the networks' inputs are scaled to mean 0 and deviation 1 over the seen clients.
        initial_beta: mixing of each batch norm before the first round, 0 (pretrained statistics) to 1 (the client's).
        sample_count: whether both networks also read how many training samples the client has.
    """

    base_lr: float | None = None
    initialization: str = "responsive"
    log_divergence: bool = True
    standardize: bool = True
    initial_beta: float = 0.5
    sample_count: bool = True


@dataclass
class RayConfig:
    """What engine `ray` gives a client that is running.

    Attributes:
        num_cpus: CPU cores for each running client.
        num_gpus: GPUs for each running client; with a fraction, as 0.25, several clients share one.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0


@dataclass
class FederationConfig:
    """The rounds in which clients learn the two networks together.

    Attributes:
        rounds: the most rounds that are run; 0 leaves the networks as they are at the start.
        client_fraction: part of the seen clients that learn in a round, above 0 and at most 1.
        patience: rounds without a lower validation loss after which the run stops.
        engine: where clients run: `local` (in one process) or `ray` (over many processes and GPUs).
        ray: see `RayConfig`.
        cohort_size: how many clients of equal shapes are computed together: a number, or `auto`. 1 computes
            them one by one.
        validation_fraction: part of the seen clients on whose validation data a round is judged, the same in all.
        min_reply_fraction: part of a round's clients that must answer, or the run stops.
        meta_lr_decay: how `client.meta_lr` falls over the rounds, `none` or `cosine`.
        aggregation: how the clients' updates become one: `mean`, weighted by samples (Algorithm 1), or, where clients
            may lie, `median`, `trimmed_mean` or `krum`.
        max_update_norm: the longest update that a client may send; longer ones are shortened. `auto` is a hundred
            times the median of the round; null is no limit.
        max_client_weight: the largest share of a round that one client can weigh, whatever number of samples it names.
        max_loss_ratio: a round whose validation loss is more than so many times the best one is rolled back; null
            never does.
    """

    rounds: int = 100
    client_fraction: float = 0.1
    patience: int = 100
    engine: str = "local"
    ray: RayConfig = field(default_factory=RayConfig)
    cohort_size: Any = "auto"
    validation_fraction: float = 1.0
    min_reply_fraction: float = 0.5
    meta_lr_decay: str = "none"
    aggregation: str = "mean"
    max_update_norm: Any = "auto"
    max_client_weight: float = 0.75
    max_loss_ratio: float | None = 10.0


@dataclass
class BaselinesConfig:
    """Which baselines run, and where the search for their learning rates starts.

    Attributes:
        rates: learning rates that fine-tuning is tried with; the search goes beyond them where the best is at the edge.
        tune: whether the rates are searched for; false takes `tuned_rates`, those of an earlier run.
        tuned_rates: a learning rate for each method, for `tune: false`.
        l2p: whether each seen client also learns its recipe alone (L2P).
        shuffled: whether FedL2P is also tested with each client given another client's statistics.
        auto_rgn: whether rates by relative gradient norms (Auto-RGN) are tuned and tested.
        refined: whether the best fine-tuning is refined too, as the mean recipe is.
        oracle: whether the mean recipe is also refined on test data, as a bound on what refinement could reach.
    """

    rates: list[float] = field(default_factory=lambda: [0.01, 0.03, 0.1, 0.3])
    tune: bool = True
    tuned_rates: dict[str, float] = field(default_factory=dict)
    l2p: bool = True
    shuffled: bool = True
    auto_rgn: bool = True
    refined: bool = True
    oracle: bool = False


@dataclass
class WandbConfig:
    """The run in Weights & Biases.

    Attributes:
        enabled: whether the run is logged to Weights & Biases.
        project: the W&B project that the run goes to.
        name: what the run is called in W&B; null takes the name of the run's folder.
        mode: how it is logged: `online`, `offline` or `disabled`; null is online where somebody is logged in and
            offline elsewhere.
    """

    enabled: bool = True
    project: str = "fedl2p"
    name: str | None = None
    mode: str | None = None


@dataclass
class Config:
    """Everything that a run needs.

    Attributes:
        seed: the number that everything random in the run follows from.
        output_dir: the run's folder; it is made, and must not hold another run.
        threads: how many CPU threads torch uses; null leaves torch's choice.
        data: the class of the data set, see `ComponentConfig`.
        model: the class of the network, see `ComponentConfig`.
        pretraining: see `PretrainingConfig`.
        client: see `ClientConfig`.
        hypergradient: see `HypergradientConfig`.
        meta_nets: see `MetaNetsConfig`.
        federation: see `FederationConfig`.
        baselines: see `BaselinesConfig`.
        refinement: see `RefinementSettings`; with 0 steps nothing is refined.
        trainer: arguments of lightning.Trainer, as accelerator, devices and precision.
        wandb: see `WandbConfig`.
    """

    seed: int = 0
    output_dir: str = "???"
    threads: int | None = None
    data: ComponentConfig = field(default_factory=ComponentConfig)
    model: ComponentConfig = field(default_factory=ComponentConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    hypergradient: HypergradientConfig = field(default_factory=HypergradientConfig)
    meta_nets: MetaNetsConfig = field(default_factory=MetaNetsConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)
    refinement: RefinementSettings = field(default_factory=RefinementSettings)
    trainer: dict[str, Any] = field(default_factory=dict)
    wandb: WandbConfig = field(default_factory=WandbConfig)
