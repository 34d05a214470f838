"""A policy from a run's folder: recipes by name, plain models, and one clear error for what is wrong."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from core_cases import ConvNet, aged, image_batches, seeded, unchanged
from core_cases import PictureAndAge as PictureAndAge
from torch import Tensor, nn

import fedl2p
from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.refinement import RefinementSettings
from fedl2p.errors import DataError, FedL2PError, ModelError
from fedl2p.io import read_tensors, write_tensors
from fedl2p.policy import NamedHyperparameters, Policy, UnusualClientWarning
from fedl2p.policy.files import MEAN_RECIPE, META_NETS, read_policy
from fedl2p.policy.hyperparameters import unusual_inputs

Batches = list[tuple[Any, Any]]


def batches(*sizes: int, seed: int = 1, shift: float = 0.5) -> Batches:
    return [(x.float(), y) for x, y in image_batches(*sizes, seed=seed, shift=shift)]


def loss(model: nn.Module, data: Batches) -> float:
    with torch.no_grad():
        return float(sum(nn.functional.cross_entropy(model(x), y) for x, y in data))


def test_it_is_one_of_the_package_s_names() -> None:
    assert fedl2p.Policy is Policy


def test_a_recipe_has_the_model_s_own_names(network: nn.Module, write: Any) -> None:
    policy = Policy.load(write(network))
    found = policy(network, batches(5, 4))
    assert list(found.beta) == ["bn1", "bn2"]
    assert list(found.eta) == [name for name, _ in network.named_parameters()]
    assert all(0 <= beta <= 1 for beta in found.beta.values())
    nets = read_policy(write(network) / META_NETS).nets_for(convert_batchnorm(network))
    assert found.vectors(nets).eta.tolist() == list(found.eta.values())


def test_a_personalized_model_is_a_plain_one_that_learned_and_leaves_the_global_one_alone(
    network: nn.Module, write: Any
) -> None:
    data = batches(8, 8)
    policy = Policy.load(write(network))
    with unchanged(network.state_dict()):
        personalized = policy.personalize(network, data)
    assert [type(m) for m in personalized.modules()] == [type(m) for m in network.modules()]
    assert not personalized.training
    assert loss(personalized, data) < loss(network, data) - 0.01
    fresh = ConvNet()
    fresh.load_state_dict(personalized.state_dict(), strict=True)
    assert loss(fresh.eval(), data) == loss(personalized, data)


def test_settings_epochs_and_the_mean_recipe_come_with_the_file(network: nn.Module, write: Any) -> None:
    policy = Policy.load(write(network))
    assert policy.mean_recipe is not None
    assert policy.mean_recipe.beta == pytest.approx({"bn1": 0.4, "bn2": 0.4})
    done = policy.adapt(network, batches(5, 4), hyperparameters=policy.mean_recipe)
    assert len(done.train_losses) == 2 * 3
    assert done.hyperparameters.eta == pytest.approx(policy.mean_recipe.eta)
    assert done.statistics.num_samples == 9


def test_a_file_alone_is_a_policy_without_a_mean_recipe(network: nn.Module, write: Any) -> None:
    run = write(network)
    (run / MEAN_RECIPE).unlink()
    assert Policy.load(run / META_NETS).mean_recipe is None


def test_recalibrated_statistics_are_those_of_the_training_data(network: nn.Module, write: Any) -> None:
    """The first batch norm's inputs are known: of a model that is not fine-tuned, at beta 1."""
    policy = Policy.load(write(network))
    still = NamedHyperparameters({"bn1": 1.0, "bn2": 1.0}, {n: 0.0 for n, _ in network.named_parameters()})
    data = batches(6, 5)
    personalized: Any = policy.personalize(network, data, hyperparameters=still)
    inputs = personalized.conv1(torch.cat([x for x, _ in data]))
    torch.testing.assert_close(personalized.bn1.running_mean, inputs.mean((0, 2, 3)))
    torch.testing.assert_close(personalized.bn1.running_var, inputs.var((0, 2, 3)))
    followed: Any = policy.personalize(network, data, hyperparameters=still, recalibrate=False)
    assert not torch.allclose(followed.bn2.running_var, personalized.bn2.running_var)


@pytest.mark.parametrize("own_data", [True, False])
def test_refinement_does_not_raise_the_validation_loss(network: nn.Module, write: Any, own_data: bool) -> None:
    policy = Policy.load(write(network))
    val = batches(12, seed=5) if own_data else None
    plain = policy.adapt(network, batches(8, 8))
    done = policy.adapt(network, batches(8, 8), refine=RefinementSettings(steps=2), val_loader=val)
    assert len(done.refinement_losses) == 3
    assert min(done.refinement_losses) < done.refinement_losses[0]
    assert done.hyperparameters.beta == plain.hyperparameters.beta
    assert done.hyperparameters.eta != plain.hyperparameters.eta
    assert len(done.train_losses) == len(plain.train_losses)


def test_statistics_can_be_taken_without_augmentation(network: nn.Module, write: Any) -> None:
    policy = Policy.load(write(network))
    augmented, plain = batches(8, 8, shift=3.0), batches(8, 8)
    done = policy.adapt(network, augmented, statistics_loader=plain)
    assert done.hyperparameters.eta == policy(network, plain).eta
    given = {"hyperparameters": policy.mean_recipe}
    first = [
        policy.adapt(network, augmented, statistics_loader=loader, **given).train_losses[0] for loader in (plain, None)
    ]
    assert first[0] == pytest.approx(first[1])


def test_inputs_by_name_and_float64(write: Any) -> None:
    model = seeded(PictureAndAge).eval()
    data = aged(image_batches(6, 5, seed=1), by_name=True)
    personalized = Policy.load(write(model)).personalize(model, data)
    out = personalized(**data[0][0])
    assert out.dtype == torch.float64
    assert torch.isfinite(out).all()


# Clients that the nets do not know


def standardized(network: nn.Module, write: Any) -> Path:
    """A run whose nets know the range of four clients much like each other."""
    run: Path = write(network)
    converted = convert_batchnorm(network)
    nets = read_policy(run / META_NETS).nets_for(converted)
    known = [fedl2p.collect_statistics(converted, batches(30, seed=seed)) for seed in range(4)]
    xi, moments, count = (torch.stack(part) for part in zip(*(s.net_inputs() for s in known), strict=True))
    nets.standardize(xi, moments, count)
    tensors, metadata = read_tensors(run / META_NETS)
    del metadata["checksum"]
    write_tensors(run / META_NETS, tensors | dict(nets.named_buffers()), metadata)
    return run


def test_a_client_unlike_the_seen_ones_is_a_warning_that_names_the_inputs(network: nn.Module, write: Any) -> None:
    policy = Policy.load(standardized(network, write))
    assert policy(network, batches(30, seed=2)).unusual == {}
    with pytest.warns(UnusualClientWarning, match=r"mean of the inputs of conv1 \(\+\d+ SD\)"):
        found = policy(network, batches(30, seed=9, shift=6.0))
    assert found.unusual["mean of the inputs of conv1"] > 5
    distances = [abs(value) for value in found.unusual.values()]
    assert distances == sorted(distances, reverse=True)


def test_the_mean_recipe_needs_no_warning(network: nn.Module, write: Any) -> None:
    policy = Policy.load(standardized(network, write))
    policy.personalize(network, batches(30, seed=9, shift=6.0), hyperparameters=policy.mean_recipe)


def test_nets_that_read_their_inputs_as_they_are_know_no_range(network: nn.Module, write: Any) -> None:
    converted = convert_batchnorm(network)
    nets = read_policy(write(network) / META_NETS).nets_for(converted)
    assert unusual_inputs(nets, fedl2p.collect_statistics(converted, batches(9, shift=50.0))) == {}


# Other names


class Wrapped(nn.Module):
    """The same network, inside of another module."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.body = network

    def forward(self, inputs: Tensor) -> Tensor:
        return self.body(inputs)


NAMES = {name: f"body.{name}" for name in ("conv1", "bn1", "conv2", "bn2", "fc")}


def test_a_map_fits_a_policy_to_layers_with_other_names(network: nn.Module, write: Any) -> None:
    run, data = write(network), batches(5, 4)
    own = Policy.load(run)(network, data)
    policy = Policy.load(run, names=NAMES)
    found = policy(Wrapped(network), data)
    assert found.eta == {f"body.{name}": value for name, value in own.eta.items()}
    assert policy.mean_recipe is not None
    assert list(policy.mean_recipe.beta) == ["body.bn1", "body.bn2"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (None, "another model; batchnorm_names differ"),
        ({**NAMES, "bn": "body.bn"}, "has 'bn', but no layer"),
        ({**NAMES, "bn1": "body.bn2", "bn2": "body.bn1"}, "another order"),
    ],
)
def test_a_map_that_does_not_fit_says_so(
    network: nn.Module, write: Any, names: dict[str, str] | None, words: str
) -> None:
    run = write(network)
    with pytest.raises(ModelError, match=words):
        Policy.load(run, names=names)(Wrapped(network), batches(5, 4))


# What is wrong


def spoiled(data: Batches, *, pixel: float | None = None, label: int | None = None) -> Batches:
    data = copy.deepcopy(data)
    if pixel is not None:
        data[1][0][0, 0, 0, 0] = pixel
    if label is not None:
        data[1][1][0] = label
    return data


WRONG: dict[str, tuple[Batches, str]] = {
    "one sample": (batches(1), "at least two"),
    "no batch": ([], "gave no batch"),
    "NaN": (spoiled(batches(5, 4), pixel=float("nan")), "Batch 1 .* NaN or infinite"),
    "infinite": (spoiled(batches(5, 4), pixel=float("inf")), "Batch 1 .* NaN or infinite"),
    "label too large": (spoiled(batches(5, 4), label=3), "label 3; the model has the classes 0 to 2"),
    "label negative": (spoiled(batches(5, 4), label=-1), "label -1"),
    "channels": ([(torch.randn(4, 3, 4, 4), torch.zeros(4, dtype=torch.int64))], r"\(3, 4, 4\)"),
    "no pair": ([torch.randn(4, 1, 4, 4)], "no pair"),  # type: ignore[list-item]  # that is the point
    "an empty batch": ([(torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.int64))], "no samples"),
    "two shapes": ([*batches(4), (torch.randn(4, 1, 6, 6), torch.zeros(4, dtype=torch.int64))], "before it"),
}


@pytest.mark.parametrize("what", WRONG)
def test_data_of_no_use_are_one_error_of_ours(network: nn.Module, write: Any, what: str) -> None:
    data, words = WRONG[what]
    policy = Policy.load(write(network))
    for call in (policy, policy.personalize):
        with pytest.raises(DataError, match=words):
            call(network, data)


def test_data_of_another_shape_than_the_run_s_are_refused(network: nn.Module, write: Any) -> None:
    policy = Policy.load(write(network, input_shape=(1, 4, 4)))
    policy(network, batches(5))
    larger = [(torch.randn(5, 1, 6, 6), torch.zeros(5, dtype=torch.int64))]
    with pytest.raises(DataError, match=r"shape \(1, 6, 6\); the policy was learned with \(1, 4, 4\)"):
        policy(network, larger)


def test_a_model_of_another_architecture_is_refused(network: nn.Module, write: Any) -> None:
    other = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(ModelError, match="another model"):
        Policy.load(write(network))(other, batches(5))


def test_a_converted_model_is_refused(network: nn.Module, write: Any) -> None:
    with pytest.raises(ModelError, match="converted already"):
        Policy.load(write(network))(convert_batchnorm(network), batches(5))


def test_hyperparameters_of_another_model_are_refused(network: nn.Module, write: Any) -> None:
    policy = Policy.load(write(network))
    other = NamedHyperparameters({"bn1": 1.0, "bn3": 1.0}, {})
    with pytest.raises(ModelError, match="'bn2'"):
        policy.personalize(network, batches(5), hyperparameters=other)


def test_rates_that_diverge_are_an_error_and_no_model(network: nn.Module, write: Any) -> None:
    policy = Policy.load(write(network))
    wild = NamedHyperparameters({"bn1": 1.0, "bn2": 1.0}, {n: 1e38 for n, _ in network.named_parameters()})
    with pytest.raises(FedL2PError, match="did not stay finite"):
        policy.personalize(network, batches(8, 8), hyperparameters=wild)


@pytest.mark.parametrize("file", [META_NETS, MEAN_RECIPE])
def test_a_file_that_was_cut_off_or_changed_is_refused(network: nn.Module, write: Any, file: str) -> None:
    path = write(network) / file
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"{}"):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="cannot be read"):
            Policy.load(path.parent)


@pytest.mark.parametrize(
    ("key", "value"),
    [("batchnorm_names", "[1"), ("settings", '{"finetune_epochs": -1}'), ("input_shape", '"x"')],
)
def test_damaged_words_about_the_nets_are_refused(network: nn.Module, write: Any, key: str, value: str) -> None:
    path = write(network) / META_NETS
    tensors, metadata = read_tensors(path)
    del metadata["checksum"]
    write_tensors(path, tensors, metadata | {key: value})
    with pytest.raises(ModelError, match="damaged"):
        Policy.load(path)


def test_a_folder_without_a_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)):
        Policy.load(tmp_path)
