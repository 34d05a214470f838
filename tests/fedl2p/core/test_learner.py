"""A learner of a cohort answers what its clients answer one by one, in order, bit for bit the same each time."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from core_cases import ConvNet, close, image_batches, named_inputs_case, seeded, unchanged
from torch import Tensor, nn
from torch.func import functional_call

from fedl2p.core import cohort
from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.cohort import stack
from fedl2p.core.differentiation import FUNC_TRANSFORMS, Autograd, CompiledSteps, Differentiation, FuncTransforms
from fedl2p.core.episode import Episode, make_episode
from fedl2p.core.functional import Batch, FunctionalModel, Tensors
from fedl2p.core.hypergradients import FOMAML, IFT, HypergradientEstimator, Unrolled
from fedl2p.core.learner import Evaluation, Learner, MetaUpdate
from fedl2p.core.meta_nets import Hyperparameters, MetaNets
from fedl2p.core.settings import BatchNormMode, LearnerSettings, MetaLearningRates
from fedl2p.core.statistics import collect_statistics
from fedl2p.errors import DataError

RATES = MetaLearningRates(bn_net=0.05, lr_net=0.05, base_lr=0.01)
# Batch sizes of (train, val, test): clients 0, 2 and 4 agree in shape, and so do 1 and 3.
SHAPES = [
    ((5, 4), (3, 2), (4,)),
    ((6,), (4,), (3, 1)),
    ((5, 4), (3, 2), (4,)),
    ((6,), (4,), (3, 1)),
    ((5, 4), (3, 2), (4,)),
]
ESTIMATORS = [IFT(form="paper"), IFT(), FOMAML(), Unrolled(), Unrolled(steps=1)]


def float32(batches: list[Batch]) -> list[Batch]:
    return [(x.float(), y) for x, y in batches]


class Fleet:
    """A model in float32, five clients, and a lambda for each."""

    def __init__(self, shapes: Sequence[tuple[tuple[int, ...], ...]] = SHAPES) -> None:
        self.module = convert_batchnorm(seeded(ConvNet).float())
        self.model = FunctionalModel.of(self.module)
        self.episodes = []
        for index, (train, val, test) in enumerate(shapes):
            parts = [
                float32(image_batches(*sizes, seed=10 * index + k, shift=index / 3))
                for k, sizes in enumerate((train, val, test))
            ]
            self.episodes.append(make_episode(self.model, collect_statistics(self.module, parts[0]), *parts))
        torch.manual_seed(7)
        self.nets = MetaNets(self.module, base_lr=0.05)
        self.lambdas = [
            {n: p.detach() + 0.01 * torch.randn_like(p) for n, p in self.nets.named_parameters()} for _ in self.episodes
        ]
        self.recipes = [
            Hyperparameters(torch.rand(2), 0.2 * torch.rand(9) * (torch.rand(9) > 0.3)) for _ in self.episodes
        ]

    def learner(self, estimator: HypergradientEstimator | None = None, **settings: Any) -> Learner:
        return Learner(
            self.model, self.nets, estimator=estimator, settings=LearnerSettings.of(meta_lr=RATES, **settings)
        )

    def update(self, max_cohort: int, estimator: HypergradientEstimator, rows: int = 2) -> list[MetaUpdate]:
        return self.learner(estimator).meta_update(self.lambdas, [self.episodes] * rows, max_cohort=max_cohort)

    def evaluate(self, max_cohort: int | None, **options: Any) -> list[dict[str, Evaluation]]:
        return self.learner().evaluate(self.episodes, self.recipes, max_cohort=max_cohort, **options)


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("max_cohort", [2, 16])
def test_meta_update_of_a_cohort_equals_one_client_at_a_time(
    estimator: HypergradientEstimator, max_cohort: int
) -> None:
    fleet = Fleet()
    singles, together = fleet.update(1, estimator), fleet.update(max_cohort, estimator)
    for start, single, grouped in zip(fleet.lambdas, singles, together, strict=True):
        near(grouped.val_losses, single.val_losses)
        near(grouped.hyperparameters.beta, single.hyperparameters.beta)
        near(grouped.hyperparameters.eta, single.hyperparameters.eta)
        assert grouped.skipped == single.skipped == 0
        assert grouped.val_losses.shape == (2,)
        assert any(not torch.equal(p, start[n]) for n, p in single.lambda_.items())
        for name, value in single.lambda_.items():
            near(grouped.lambda_[name], value)


@pytest.mark.parametrize("bn_mode", BatchNormMode)
@pytest.mark.parametrize("finetune", [True, False])
def test_evaluate_of_a_cohort_equals_one_client_at_a_time(bn_mode: BatchNormMode, finetune: bool) -> None:
    fleet = Fleet()
    singles, together = (fleet.evaluate(size, bn_mode=bn_mode, finetune=finetune) for size in (1, 16))
    for episode, single, grouped in zip(fleet.episodes, singles, together, strict=True):
        assert set(grouped) == {"val", "test"}
        for part, expected in single.items():
            near(grouped[part].outputs, expected.outputs)
            assert grouped[part].loss == pytest.approx(expected.loss, rel=1e-5)
            targets = torch.cat([y for _, y in getattr(episode, f"{part}_batches")])
            assert torch.equal(grouped[part].targets, targets)
            near(nn.functional.cross_entropy(expected.outputs, targets), torch.tensor(expected.loss))


def test_order_is_kept_with_ragged_shapes() -> None:
    fleet = Fleet()
    order = [3, 0, 4, 1, 2]
    together = fleet.evaluate(16)
    fleet.episodes, fleet.recipes = ([own[i] for i in order] for own in (fleet.episodes, fleet.recipes))
    shuffled = fleet.evaluate(16)
    for row, i in enumerate(order):
        near(shuffled[row]["test"].outputs, together[i]["test"].outputs)


@pytest.mark.parametrize("single", [Autograd(), Autograd(fused_batchnorm=True), FUNC_TRANSFORMS])
def test_however_single_clients_are_differentiated_cohorts_are_stacked(single: Differentiation) -> None:
    fleet = Fleet()
    learner = fleet.learner()
    learner.single = single
    for one, other in zip(learner.evaluate(fleet.episodes, fleet.recipes), fleet.evaluate(16), strict=True):
        near(one["test"].outputs, other["test"].outputs)


@pytest.mark.parametrize("estimator", [IFT(), Unrolled()])
def test_two_runs_are_bit_for_bit_equal(estimator: HypergradientEstimator) -> None:
    first, second = Fleet().update(16, estimator), Fleet().update(16, estimator)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.val_losses, b.val_losses)
        assert all(torch.equal(value, b.lambda_[name]) for name, value in a.lambda_.items())
    runs = [Fleet().evaluate(16) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a["test"].outputs, b["test"].outputs)


def test_more_iterations_go_on_from_the_updated_lambda_with_their_own_batches() -> None:
    fleet = Fleet()
    other = []
    for episode in fleet.episodes:
        train = [(x + 0.1, y) for x, y in episode.train_batches]
        other.append(episode._replace(train_batches=train, loss_batch=train[0]))
    learner = fleet.learner(IFT())
    both = learner.meta_update(fleet.lambdas, [fleet.episodes, other], max_cohort=16)
    first = learner.meta_update(fleet.lambdas, [fleet.episodes], max_cohort=16)
    second = learner.meta_update([u.lambda_ for u in first], [other], max_cohort=16)
    for whole, a, b in zip(both, first, second, strict=True):
        near(whole.val_losses, torch.cat([a.val_losses, b.val_losses]), 1e-6)
        for name, value in b.lambda_.items():
            near(whole.lambda_[name], value, 1e-6)


def test_a_client_that_is_not_finite_is_skipped_and_counted_and_its_cohort_is_untouched() -> None:
    fleet = Fleet()
    clean = fleet.update(16, IFT())
    broken = [(x.clone(), y) for x, y in fleet.episodes[2].val_batches]
    broken[0][0][0] = float("nan")
    fleet.episodes[2] = fleet.episodes[2]._replace(val_batches=broken)
    updates = fleet.update(16, IFT())
    assert [u.skipped for u in updates] == [0, 0, 2, 0, 0]
    for name, value in fleet.lambdas[2].items():
        assert torch.equal(updates[2].lambda_[name], value)
    for i in (0, 1, 3, 4):
        assert torch.equal(updates[i].val_losses, clean[i].val_losses)
        for name, value in clean[i].lambda_.items():
            assert torch.equal(updates[i].lambda_[name], value)


def test_nothing_that_the_caller_holds_is_changed() -> None:
    fleet = Fleet()
    held = (fleet.lambdas, fleet.recipes, fleet.episodes, fleet.module.state_dict(), fleet.nets.state_dict())
    with unchanged(held):
        updates = fleet.update(16, Unrolled())
        fleet.evaluate(16)
    assert not any(p.requires_grad for update in updates for p in update.lambda_.values())


def plain_of(fleet: Fleet, index: int, *, finetune: bool) -> nn.Module:
    """An ordinary torch model with the personalized parameters of one client."""
    model = seeded(ConvNet).float()
    if finetune:
        state = fleet.learner().personalize(fleet.episodes[index], fleet.recipes[index])
        model.load_state_dict(state.parameters, strict=False)
    return model


@pytest.mark.parametrize("finetune", [True, False])
def test_batch_statistics_are_those_of_torch_on_the_whole_test_set(finetune: bool) -> None:
    fleet = Fleet()
    fleet.recipes = [Hyperparameters(torch.ones(2), recipe.eta) for recipe in fleet.recipes]
    answers = fleet.evaluate(16, parts=("test",), bn_mode=BatchNormMode.batch, finetune=finetune)
    for index, (episode, answer) in enumerate(zip(fleet.episodes, answers, strict=True)):
        model = plain_of(fleet, index, finetune=finetune).train()
        inputs = torch.cat([x for x, _ in episode.test_batches])
        near(answer["test"].outputs, model(inputs).detach())


def test_without_finetuning_and_with_beta_0_theta_g_itself_is_measured() -> None:
    fleet = Fleet()
    model = seeded(ConvNet).float().eval()
    fleet.recipes = [Hyperparameters(torch.zeros(2), torch.ones(9))] * 5
    answers = fleet.evaluate(16, parts=("val",), finetune=False)
    for episode, answer in zip(fleet.episodes, answers, strict=True):
        assert set(answer) == {"val"}
        assert isinstance(answer["val"], Evaluation)
        near(answer["val"].outputs, model(torch.cat([x for x, _ in episode.val_batches])).detach())


def test_clients_with_a_rate_of_exactly_0_skip_work_without_a_difference() -> None:
    fleet = Fleet()
    recipes = copy.copy(fleet.recipes)
    recipes[0] = Hyperparameters(recipes[0].beta, torch.zeros(9))
    together = fleet.learner().evaluate(fleet.episodes, recipes, max_cohort=16)
    alone = fleet.learner().evaluate(fleet.episodes[:1], recipes[:1])
    near(together[0]["test"].outputs, alone[0]["test"].outputs)


def test_a_model_with_dropout_runs_as_a_cohort() -> None:
    fleet = Fleet()
    fleet.module.dropout.p = 0.5
    updates = fleet.update(16, IFT(), rows=1)
    assert all(torch.isfinite(u.val_losses).all() for u in updates)


# One meta iteration, of one client or of a stacked cohort


def float64_fleet() -> tuple[Learner, list[Tensors], list[Episode]]:
    """Three clients of equal shapes, each with a lambda of its own, of which one moves a tensor less."""
    module = convert_batchnorm(seeded(ConvNet))
    model = FunctionalModel.of(module)
    episodes = []
    for index in range(3):
        train, val = (image_batches(*sizes, seed=10 * index + k) for k, sizes in enumerate([(5, 4), (3, 2)]))
        episodes.append(make_episode(model, collect_statistics(module, train), train, val))
    torch.manual_seed(7)
    learner = Learner(model, MetaNets(module, base_lr=0.05).double())
    lambdas = [{n: p + 0.01 * torch.randn_like(p) for n, p in learner.lambda_().items()} for _ in episodes]
    lambdas[0]["base_lr"][3] = 0.0
    return learner, lambdas, episodes


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("clients", [1, 3])
def test_a_meta_step_of_a_stacked_cohort_equals_those_of_its_clients(
    estimator: HypergradientEstimator, clients: int
) -> None:
    learner, lambdas, episodes = float64_fleet()
    learner.estimator = estimator
    lambdas, episodes = lambdas[:clients], episodes[:clients]
    together = learner.meta_step(stack(lambdas), stack(episodes))
    assert together.val_loss.shape == together.finite.shape == (clients,)
    assert together.finite.all()
    for row, (lambda_, episode) in enumerate(zip(lambdas, episodes, strict=True)):
        single = learner.meta_step(lambda_, episode)
        close(together.val_loss[row], single.val_loss, 1e-11)
        close(together.hyperparameters.beta[row], single.hyperparameters.beta, 1e-11)
        close(together.hyperparameters.eta[row], single.hyperparameters.eta, 1e-11)
        assert list(together.gradients) == list(single.gradients) == list(lambda_)
        for name, gradient in single.gradients.items():
            close(together.gradients[name][row], gradient, 1e-9)


def test_a_single_client_is_differentiated_as_the_learner_says_and_a_cohort_by_transforms() -> None:
    learner, lambdas, episodes = float64_fleet()
    asked: list[int] = []

    class Counted(FuncTransforms):
        def inner_step(self, model: Any, state: Any, batch: Any, beta: Any, rates: Any) -> Any:
            asked.append(len(rates))
            return super().inner_step(model, state, batch, beta, rates)

    learner.single = Counted()
    learner.meta_step(lambdas[0], episodes[0])
    assert asked == [8, 8]  # of 9 tensors, one has a rate of 0
    learner.meta_step(stack(lambdas[:1]), stack(episodes[:1]))
    assert asked == [8] * 4
    learner.personalize(episodes[1], learner.recipe(lambdas[1], episodes[1].net_inputs))
    assert asked == [8] * 4 + [9] * 2
    learner.meta_step(stack(lambdas), stack(episodes))
    assert len(asked) == 6


@pytest.mark.parametrize("clients", [1, 3])
def test_clients_without_training_data_learn_from_the_direct_part(clients: int) -> None:
    learner, lambdas, episodes = float64_fleet()
    bare = [episode._replace(train_batches=[], loss_batch=()) for episode in episodes[:clients]]
    for estimator in ESTIMATORS:
        learner.estimator = estimator
        for update in learner.meta_update(lambdas[:clients], [bare]):
            assert update.skipped == 0
            assert torch.isfinite(update.val_losses).all()


def test_meta_updates_take_the_learner_s_settings() -> None:
    learner, lambdas, episodes = float64_fleet()
    learner.settings = LearnerSettings(meta_lr=RATES, clip_value=1e-4)
    step = learner.meta_step(lambdas[0], episodes[0])
    assert max(float(g.abs().max()) for g in step.gradients.values()) == 1e-4
    for scale in (1.0, 0.5):
        (update,) = learner.meta_update(lambdas[:1], [episodes[:1]], meta_lr_scale=scale)
        for name, start in lambdas[0].items():
            rate = scale * getattr(RATES, name.partition(".")[0])
            close(update.lambda_[name], start - rate * step.gradients[name], 1e-12)


def test_evaluation_takes_the_statistics_of_the_settings_unless_told_otherwise() -> None:
    fleet = Fleet()
    by_batch = fleet.learner(evaluation_statistics="batch")
    expected, other = (fleet.evaluate(None, bn_mode=mode) for mode in (BatchNormMode.batch, BatchNormMode.running))
    for default, told, batch, running in zip(
        by_batch.evaluate(fleet.episodes, fleet.recipes),
        by_batch.evaluate(fleet.episodes, fleet.recipes, bn_mode=BatchNormMode.running),
        expected,
        other,
        strict=True,
    ):
        assert torch.equal(default["val"].outputs, batch["val"].outputs)
        assert torch.equal(told["val"].outputs, running["val"].outputs)
        assert not torch.equal(default["val"].outputs, running["val"].outputs)


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_client_without_data_for_a_part_is_an_error(part: str) -> None:
    fleet = Fleet()
    fleet.episodes[3] = fleet.episodes[3]._replace(**{f"{part}_batches": []})
    with pytest.raises(DataError, match=f"no {part} data"):
        fleet.evaluate(None)
    others = tuple({"val", "test"} - {part})
    assert set(fleet.evaluate(None, parts=others)[3]) == set(others)


def test_the_learner_s_lambda_is_a_copy_and_its_recipe_keeps_no_graph() -> None:
    fleet = Fleet()
    learner = fleet.learner()
    lambda_ = learner.lambda_()
    with unchanged(fleet.nets.state_dict()):
        for tensor in lambda_.values():
            assert not tensor.requires_grad
            tensor += 1
    recipe = learner.recipe(fleet.lambdas[0], fleet.episodes[0].net_inputs)
    expected = functional_call(fleet.nets, fleet.lambdas[0], fleet.episodes[0].net_inputs)
    for found, wanted in zip(recipe, expected, strict=True):
        assert torch.equal(found, wanted) and not found.requires_grad


# Which kernels a learner takes


def test_a_learner_starts_with_the_exact_estimator_the_default_settings_and_autograd_or_compiled_steps() -> None:
    fleet = Fleet()
    plain, compiled = Learner(fleet.model, fleet.nets), Learner(fleet.model, fleet.nets, compile=True)
    assert isinstance(plain.estimator, Unrolled) and plain.estimator.steps is None
    assert plain.settings == LearnerSettings()
    assert plain.single == Autograd()
    assert isinstance(compiled.single, CompiledSteps)


BATCH = torch.zeros(5, 1, 4, 4)  # 620 activations


@pytest.mark.parametrize(("budget", "fused"), [(619, True), (2 * 620 - 1, True), (2 * 620, False), (10**9, False)])
def test_networks_too_large_to_be_stacked_take_fused_kernels(
    monkeypatch: pytest.MonkeyPatch, budget: int, fused: bool
) -> None:
    monkeypatch.setattr(cohort, "CPU_COHORT_VALUES", budget)
    fleet = Fleet()
    learner = fleet.learner()
    expected = learner.evaluate(fleet.episodes[:1], fleet.recipes[:1])
    learner.fit_to(BATCH)
    assert (learner.cohort_size(BATCH) == 1) is fused
    assert learner.single == Autograd(fused_batchnorm=fused)
    kept = learner.origin.parameters["conv2.weight"]
    assert kept.is_contiguous(memory_format=torch.channels_last) is fused
    assert kept.data_ptr() == dict(fleet.module.named_parameters())["conv2.weight"].data_ptr()
    (found,) = learner.evaluate(fleet.episodes[:1], fleet.recipes[:1])
    near(found["test"].outputs, expected[0]["test"].outputs)


def test_compiled_steps_stay_compiled_whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohort, "CPU_COHORT_VALUES", 1)
    fleet = Fleet()
    learner = Learner(fleet.model, fleet.nets, compile=True)
    learner.fit_to(BATCH)
    assert isinstance(learner.single, CompiledSteps)
    assert learner.origin.parameters["conv2.weight"].is_contiguous()


def test_large_networks_of_volumes_and_of_many_inputs_fit_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohort, "CPU_COHORT_VALUES", 1)

    class Volume(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.Linear(3, 3)

        def forward(self, volume: Tensor, age: Tensor) -> Tensor:
            features = torch.tanh(self.bn(self.conv(volume))).mean((2, 3, 4))
            return self.fc(torch.cat([features, age], 1))

    module = convert_batchnorm(seeded(Volume))
    model = FunctionalModel.of(module)
    learner = Learner(model, MetaNets(module).double())
    inputs = {"volume": torch.randn(4, 1, 2, 2, 4).double(), "age": torch.rand(4, 1).double()}
    batch = (inputs, torch.tensor([0, 1, 2, 1]))
    learner.fit_to(inputs)
    assert learner.single == Autograd(fused_batchnorm=True)
    episode = make_episode(model, collect_statistics(module, [batch]), [batch], [batch])
    assert learner.meta_step(learner.lambda_(), episode).finite


@pytest.mark.parametrize("by_name", [True, False])
def test_a_cohort_of_clients_with_several_inputs_equals_one_client_at_a_time(by_name: bool) -> None:
    case = named_inputs_case(by_name=by_name)
    episode = make_episode(case.model, case.statistics, case.train, case.val)
    learner = Learner(case.model, MetaNets(case.model.module, base_lr=0.05).double())
    lambdas = [{n: p * scale for n, p in learner.lambda_().items()} for scale in (1.0, 0.9)]
    together = learner.meta_update(lambdas, [[episode, episode]])
    singles = learner.meta_update(lambdas, [[episode, episode]], max_cohort=1)
    for grouped, single in zip(together, singles, strict=True):
        close(grouped.val_losses, single.val_losses, 1e-10)
        for name, value in single.lambda_.items():
            close(grouped.lambda_[name], value, 1e-10)
    recipes = [update.hyperparameters for update in singles]
    for grouped, single in zip(
        learner.evaluate([episode, episode], recipes, parts=("val",)),
        learner.evaluate([episode, episode], recipes, parts=("val",), max_cohort=1),
        strict=True,
    ):
        close(grouped["val"].outputs, single["val"].outputs, 1e-10)
