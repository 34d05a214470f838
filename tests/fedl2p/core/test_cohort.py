"""A cohort answers what its clients answer one by one, in order, bit for bit the same each time."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from core_cases import ConvNet, image_batches, seeded, unchanged
from torch import Tensor, nn

from fedl2p.core import cohort
from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.cohort import (
    ClientTask,
    CohortRunner,
    Evaluation,
    MetaUpdate,
    activations,
    automatic_cohort_size,
    groups,
    stack,
    take,
)
from fedl2p.core.functional import Batch, FunctionalModel
from fedl2p.core.hypergradients import FOMAML, IFT, HypergradientEstimator, Unrolled
from fedl2p.core.meta_nets import Hyperparameters, MetaNets
from fedl2p.core.meta_step import personalize
from fedl2p.core.statistics import collect_statistics

RATES = {"bn_net": 0.05, "lr_net": 0.05, "base_lr": 0.01}
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
        self.tasks = []
        for index, (train, val, test) in enumerate(shapes):
            parts = [
                float32(image_batches(*sizes, seed=10 * index + k, shift=index / 3))
                for k, sizes in enumerate((train, val, test))
            ]
            self.tasks.append(ClientTask(collect_statistics(self.module, parts[0]), *parts))
        torch.manual_seed(7)
        self.nets = MetaNets(self.module, base_lr=0.05)
        self.lambdas = [
            {n: p.detach() + 0.01 * torch.randn_like(p) for n, p in self.nets.named_parameters()} for _ in self.tasks
        ]
        self.recipes = [Hyperparameters(torch.rand(2), 0.2 * torch.rand(9) * (torch.rand(9) > 0.3)) for _ in self.tasks]

    def runner(self, cohort_size: int) -> CohortRunner:
        return CohortRunner(self.model, cohort_size=cohort_size)

    def update(self, cohort_size: int, estimator: HypergradientEstimator, rows: int = 2) -> list[MetaUpdate]:
        runner = self.runner(cohort_size)
        return runner.meta_update(self.nets, estimator, self.lambdas, [self.tasks] * rows, meta_lr=RATES)


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("cohort_size", [2, 16])
def test_meta_update_of_a_cohort_equals_one_client_at_a_time(
    estimator: HypergradientEstimator, cohort_size: int
) -> None:
    fleet = Fleet()
    singles, together = fleet.update(1, estimator), fleet.update(cohort_size, estimator)
    for start, single, grouped in zip(fleet.lambdas, singles, together, strict=True):
        near(grouped.val_losses, single.val_losses)
        near(grouped.hyperparameters.beta, single.hyperparameters.beta)
        near(grouped.hyperparameters.eta, single.hyperparameters.eta)
        assert grouped.skipped == single.skipped == 0
        assert grouped.val_losses.shape == (2,)
        assert any(not torch.equal(p, start[n]) for n, p in single.lambda_.items())
        for name, value in single.lambda_.items():
            near(grouped.lambda_[name], value)


@pytest.mark.parametrize("statistics", ["running", "batch"])
@pytest.mark.parametrize("finetune", [True, False])
def test_evaluate_of_a_cohort_equals_one_client_at_a_time(statistics: str, finetune: bool) -> None:
    fleet = Fleet()
    singles, together = (
        fleet.runner(size).evaluate(fleet.tasks, fleet.recipes, statistics=statistics, finetune=finetune)
        for size in (1, 16)
    )
    for task, single, grouped in zip(fleet.tasks, singles, together, strict=True):
        assert set(grouped) == {"val", "test"}
        for part, expected in single.items():
            near(grouped[part].outputs, expected.outputs)
            assert grouped[part].loss == pytest.approx(expected.loss, rel=1e-5)
            targets = torch.cat([y for _, y in getattr(task, f"{part}_batches")])
            assert torch.equal(grouped[part].targets, targets)
            near(nn.functional.cross_entropy(expected.outputs, targets), torch.tensor(expected.loss))


def test_order_is_kept_with_ragged_shapes() -> None:
    fleet = Fleet()
    order = [3, 0, 4, 1, 2]
    together = fleet.runner(16).evaluate(fleet.tasks, fleet.recipes)
    shuffled = fleet.runner(16).evaluate([fleet.tasks[i] for i in order], [fleet.recipes[i] for i in order])
    for row, i in enumerate(order):
        near(shuffled[row]["test"].outputs, together[i]["test"].outputs)


def test_groups_are_of_equal_shapes_bounded_and_complete() -> None:
    fleet = Fleet()
    assert list(groups(fleet.tasks, 16)) == [[0, 2, 4], [1, 3]]
    assert list(groups(fleet.tasks, 2)) == [[0, 2], [4], [1, 3]]
    assert list(groups([], 2)) == []


def test_a_model_that_goes_alone_elsewhere_is_stacked_here() -> None:
    fleet = Fleet()
    expected = fleet.runner(16).evaluate(fleet.tasks, fleet.recipes)
    runner = CohortRunner(replace(fleet.model, alone=True))
    for one, other in zip(runner.evaluate(fleet.tasks, fleet.recipes), expected, strict=True):
        near(one["test"].outputs, other["test"].outputs)


def test_stack_and_take_are_inverse() -> None:
    trees = [{"a": torch.rand(2), "b": [(torch.rand(3), torch.rand(()))]} for _ in range(3)]
    stacked = stack(trees)
    assert stacked["b"][0][0].shape == (3, 3)
    assert torch.equal(take(stacked, 1)["b"][0][1], trees[1]["b"][0][1])


@pytest.mark.parametrize("estimator", [IFT(), Unrolled()])
def test_two_runs_are_bit_for_bit_equal(estimator: HypergradientEstimator) -> None:
    first, second = Fleet().update(16, estimator), Fleet().update(16, estimator)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.val_losses, b.val_losses)
        assert all(torch.equal(value, b.lambda_[name]) for name, value in a.lambda_.items())
    runs = [fleet.runner(16).evaluate(fleet.tasks, fleet.recipes) for fleet in (Fleet(), Fleet())]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a["test"].outputs, b["test"].outputs)


def test_more_iterations_go_on_from_the_updated_lambda_with_their_own_batches() -> None:
    fleet = Fleet()
    other = [
        ClientTask(t.statistics, [(x + 0.1, y) for x, y in t.train_batches], t.val_batches, t.test_batches)
        for t in fleet.tasks
    ]
    runner = fleet.runner(16)
    both = runner.meta_update(fleet.nets, IFT(), fleet.lambdas, [fleet.tasks, other], meta_lr=RATES)
    first = runner.meta_update(fleet.nets, IFT(), fleet.lambdas, [fleet.tasks], meta_lr=RATES)
    second = runner.meta_update(fleet.nets, IFT(), [u.lambda_ for u in first], [other], meta_lr=RATES)
    for whole, a, b in zip(both, first, second, strict=True):
        near(whole.val_losses, torch.cat([a.val_losses, b.val_losses]), 1e-6)
        for name, value in b.lambda_.items():
            near(whole.lambda_[name], value, 1e-6)


def test_a_client_that_is_not_finite_is_skipped_and_counted_and_its_cohort_is_untouched() -> None:
    fleet = Fleet()
    clean = fleet.update(16, IFT())
    broken = [(x.clone(), y) for x, y in fleet.tasks[2].val_batches]
    broken[0][0][0] = float("nan")
    task = fleet.tasks[2]
    fleet.tasks[2] = ClientTask(task.statistics, task.train_batches, broken, task.test_batches)
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
    batches = [(t.train_batches, t.val_batches, t.test_batches) for t in fleet.tasks]
    held = (fleet.lambdas, fleet.recipes, batches, fleet.module.state_dict(), fleet.nets.state_dict())
    with unchanged(held):
        updates = fleet.update(16, Unrolled())
        fleet.runner(16).evaluate(fleet.tasks, fleet.recipes)
    assert not any(p.requires_grad for update in updates for p in update.lambda_.values())


def plain_of(fleet: Fleet, index: int, *, finetune: bool) -> nn.Module:
    """An ordinary torch model with the personalized parameters of one client."""
    model = seeded(ConvNet).float()
    if finetune:
        runner, task = fleet.runner(1), fleet.tasks[index]
        state = runner._inputs([task]).running
        start = runner.origin._replace(buffers={**runner.origin.buffers, **take(state, 0)})
        tuned = personalize(fleet.model, start, task.train_batches, fleet.recipes[index])
        model.load_state_dict(tuned.final.parameters, strict=False)
    return model


@pytest.mark.parametrize("finetune", [True, False])
def test_batch_statistics_are_those_of_torch_on_the_whole_test_set(finetune: bool) -> None:
    fleet = Fleet()
    recipes = [Hyperparameters(torch.ones(2), recipe.eta) for recipe in fleet.recipes]
    answers = fleet.runner(16).evaluate(fleet.tasks, recipes, parts=("test",), statistics="batch", finetune=finetune)
    fleet.recipes = recipes
    for index, (task, answer) in enumerate(zip(fleet.tasks, answers, strict=True)):
        model = plain_of(fleet, index, finetune=finetune).train()
        inputs = torch.cat([x for x, _ in task.test_batches])
        near(answer["test"].outputs, model(inputs).detach())


def test_without_finetuning_and_with_beta_0_theta_g_itself_is_measured() -> None:
    fleet = Fleet()
    model = seeded(ConvNet).float().eval()
    recipes = [Hyperparameters(torch.zeros(2), torch.ones(9))] * 5
    answers = fleet.runner(16).evaluate(fleet.tasks, recipes, parts=("val",), finetune=False)
    for task, answer in zip(fleet.tasks, answers, strict=True):
        assert set(answer) == {"val"}
        assert isinstance(answer["val"], Evaluation)
        near(answer["val"].outputs, model(torch.cat([x for x, _ in task.val_batches])).detach())


def test_clients_with_a_rate_of_exactly_0_skip_work_without_a_difference() -> None:
    fleet = Fleet()
    recipes = copy.copy(fleet.recipes)
    recipes[0] = Hyperparameters(recipes[0].beta, torch.zeros(9))
    together = fleet.runner(16).evaluate(fleet.tasks, recipes)
    alone = fleet.runner(1).evaluate([fleet.tasks[0]], [recipes[0]])
    near(together[0]["test"].outputs, alone[0]["test"].outputs)


def test_a_model_with_dropout_runs_as_a_cohort() -> None:
    fleet = Fleet()
    fleet.module.dropout.p = 0.5
    updates = fleet.update(16, IFT(), rows=1)
    assert all(torch.isfinite(u.val_losses).all() for u in updates)


# How many clients go together


def test_activations_are_the_outputs_of_all_layers_of_a_pass() -> None:
    """conv1 2x16, bn1 2x16, conv2 3x9, bn2 3x9, dropout 3, fc 3: 124 values an image of 4x4."""
    model = FunctionalModel.of(convert_batchnorm(ConvNet().float()))
    assert activations(model, torch.zeros(5, 1, 4, 4)) == 5 * 124


@pytest.mark.parametrize(
    ("budget", "expected"), [(1, 1), (5 * 124 * 7 + 3, 7), (10**9, 64)], ids=["too large", "some", "many"]
)
def test_the_automatic_size_keeps_a_pass_within_the_budget(
    monkeypatch: pytest.MonkeyPatch, budget: int, expected: int
) -> None:
    monkeypatch.setattr(cohort, "CPU_COHORT_VALUES", budget)
    model = FunctionalModel.of(convert_batchnorm(ConvNet().float()))
    assert automatic_cohort_size(model, torch.zeros(5, 1, 4, 4), history=15) == expected
