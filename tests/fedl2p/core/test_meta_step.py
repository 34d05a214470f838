"""One meta iteration: the chain to lambda, clipping, skipping what is not finite, and the optimizer's groups."""

from typing import Any

import pytest
import torch
from core_cases import Case, close, conv_case, unchanged
from torch import Tensor
from torch.func import functional_call

from fedl2p.core.cohort import stack
from fedl2p.core.differentiation import FuncTransforms
from fedl2p.core.episode import Episode, make_episode
from fedl2p.core.finetune import FineTuned, evaluate
from fedl2p.core.functional import FunctionalModel, InnerState
from fedl2p.core.hypergradients import (
    ESTIMATORS,
    FOMAML,
    IFT,
    Hypergradient,
    HypergradientEstimator,
    Unrolled,
)
from fedl2p.core.meta_nets import Hyperparameters, MetaNets
from fedl2p.core.meta_step import MetaStep, active_in_episode, meta_optimizer, meta_step, personalize
from fedl2p.core.settings import BatchNormMode, MetaLearningRates

RATES = MetaLearningRates(bn_net=0.01, lr_net=0.02, base_lr=0.03)


def setting() -> tuple[Case, MetaNets, InnerState, dict[str, Tensor], Episode]:
    case = conv_case()
    torch.manual_seed(7)
    nets = MetaNets(case.model.module, base_lr=0.1).double()
    with torch.no_grad():
        nets.base_lr.mul_(torch.linspace(-0.5, 1.5, 9))
    lambda_ = {name: p.detach().clone() for name, p in nets.named_parameters()}
    return case, nets, InnerState(*case.model.tensors()), lambda_, case.episode()


def step(estimator: HypergradientEstimator, clip_value: float = 1e9) -> MetaStep:
    case, nets, origin, lambda_, client = setting()
    return meta_step(case.model, nets, estimator, origin, lambda_, client, clip_value=clip_value)


@pytest.mark.parametrize("estimator", [IFT(form="paper"), IFT(), FOMAML(), Unrolled(), Unrolled(steps=1)])
def test_gradients_by_lambda_are_the_estimate_pulled_back_by_autograd(estimator: HypergradientEstimator) -> None:
    case, nets, _, lambda_, client = setting()
    done = step(estimator)
    leaves = {name: p.clone().requires_grad_() for name, p in lambda_.items()}
    beta, eta = functional_call(nets, leaves, client.net_inputs)
    estimate = case._replace(beta=beta.detach(), eta=eta.detach()).estimate(estimator)
    expected = torch.autograd.grad([beta, eta], list(leaves.values()), [estimate.beta, estimate.eta])
    assert list(done.gradients) == list(lambda_)
    for name, gradient in zip(leaves, expected, strict=True):
        close(done.gradients[name], gradient, 1e-10)
    close(done.val_loss, estimate.val_loss, 1e-12)
    close(done.hyperparameters.beta, beta.detach(), 1e-12)
    close(done.hyperparameters.eta, eta.detach(), 1e-12)
    assert done.finite


def test_a_small_step_of_lambda_against_the_exact_hypergradient_lowers_the_loss_in_every_group() -> None:
    case, nets, origin, lambda_, client = setting()
    done = step(Unrolled())

    def loss(moved: dict[str, Tensor]) -> float:
        return float(meta_step(case.model, nets, FOMAML(), origin, moved, client).val_loss)

    for group in vars(RATES):
        own = {n: g for n, g in done.gradients.items() if n.startswith(group)}
        norm = float(torch.cat([g.reshape(-1) for g in own.values()]).norm())
        assert norm > 0
        for sign in (-1, 1):
            change = loss({n: p + sign * 1e-5 / norm * own.get(n, 0) for n, p in lambda_.items()}) - done.val_loss
            assert float(change) == pytest.approx(sign * 1e-5 * norm, rel=1e-2)


def test_entries_are_clipped_by_value() -> None:
    full, clipped = step(Unrolled()), step(Unrolled(), clip_value=1e-3)
    assert max(float(g.abs().max()) for g in full.gradients.values()) > 1e-3
    for name, gradient in full.gradients.items():
        assert torch.equal(clipped.gradients[name], gradient.clamp(-1e-3, 1e-3))


def test_nothing_that_the_caller_holds_is_changed_and_no_graph_is_kept() -> None:
    case, nets, origin, lambda_, client = setting()
    with unchanged(origin, lambda_, client, case.model.module.state_dict(), nets.state_dict()):
        done = meta_step(case.model, nets, IFT(), origin, lambda_, client)
    assert not any(g.requires_grad for g in done.gradients.values())


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@pytest.mark.parametrize("part", ["val_batches", "train_batches"])
def test_data_that_are_not_finite_give_zero_gradients_and_say_so(name: str, part: str) -> None:
    case, nets, origin, lambda_, client = setting()
    batches = [(x.clone(), y) for x, y in getattr(client, part)]
    batches[-1][0][0, 0, 0, 0] = float("nan")
    done = meta_step(case.model, nets, ESTIMATORS[name](), origin, lambda_, client._replace(**{part: batches}))
    assert not done.finite
    for key, gradient in done.gradients.items():
        assert torch.equal(gradient, torch.zeros_like(lambda_[key]))


def test_ift_takes_the_training_loss_on_the_first_batch() -> None:
    case, nets, origin, lambda_, _ = setting()
    seen: list[tuple[Episode, FineTuned]] = []

    class Spy(IFT):
        def __call__(
            self, model: FunctionalModel, episode: Episode, tuned: FineTuned, recipe: Hyperparameters, **options: Any
        ) -> Hypergradient:
            seen.append((episode, tuned))
            return super().__call__(model, episode, tuned, recipe, **options)

    start = make_episode(case.model, case.statistics, case.train, case.val)
    meta_step(case.model, nets, Spy(), origin, lambda_, start)
    assert seen[0][0].loss_batch[0] is start.train_batches[0][0]
    assert len(seen[0][1].history) == 1


def test_meta_optimizer_has_a_group_for_each_net_with_its_own_rate() -> None:
    _, _, _, lambda_, _ = setting()
    leaves = {name: p.requires_grad_() for name, p in lambda_.items()}
    optimizer = meta_optimizer(leaves, RATES)
    assert [(g["name"], g["lr"], len(g["params"])) for g in optimizer.param_groups] == [
        ("bn_net", 0.01, 6),
        ("lr_net", 0.02, 6),
        ("base_lr", 0.03, 1),
    ]
    before = {name: p.detach().clone() for name, p in leaves.items()}
    for p in leaves.values():
        p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    for name, p in leaves.items():
        close(p.detach(), before[name] - 2 * getattr(RATES, name.partition(".")[0]), 1e-12)


def test_meta_optimizer_leaves_out_the_group_of_a_net_that_does_not_exist() -> None:
    optimizer = meta_optimizer({"base_lr": torch.zeros(2, requires_grad=True)}, RATES)
    assert [g["name"] for g in optimizer.param_groups] == ["base_lr"]


@pytest.mark.parametrize("bn_mode", BatchNormMode)
def test_evaluate_gives_outputs_in_order_and_their_mean_loss(bn_mode: BatchNormMode) -> None:
    case, nets, origin, _, client = setting()
    recipe = nets.recipe(case.statistics)
    state = personalize(case.model, origin, client, recipe).final
    outputs, loss, val_loss = evaluate(case.model, state, recipe.beta, case.val, bn_mode=bn_mode)
    assert torch.equal(val_loss, loss)
    inputs, targets = (torch.cat(part) for part in zip(*case.val, strict=True))
    expected, _ = case.model(
        *state, recipe.beta, inputs, training=False, batch_statistics=True if bn_mode == "batch" else None
    )
    close(outputs, expected, 1e-12)
    close(loss, torch.nn.functional.cross_entropy(expected, targets), 1e-12)


# Tensors that fine-tuning does not move


@pytest.mark.parametrize("estimator", [Unrolled(), FOMAML(), IFT()], ids=lambda e: type(e).__name__)
def test_tensors_with_eta_0_are_left_out_of_fine_tuning_with_the_same_result(
    estimator: HypergradientEstimator,
) -> None:
    case, nets, origin, lambda_, client = setting()
    lambda_["base_lr"][:3] = 0.0
    active = active_in_episode(case.model, nets, lambda_, client)
    assert active == case.model.parameter_names[3:]
    stacked = {name: torch.stack([p, p]) for name, p in lambda_.items()}
    stacked["base_lr"][1, 1] = 0.5
    both = active_in_episode(case.model, nets, stacked, stack([client, client]))
    assert both == (case.model.parameter_names[1], *active)
    asked: list[int] = []

    class Counted(FuncTransforms):
        def inner_step(self, model: Any, state: Any, batch: Any, beta: Any, rates: Any) -> Any:
            asked.append(len(rates))
            return super().inner_step(model, state, batch, beta, rates)

    few = meta_step(case.model, nets, estimator, origin, lambda_, client, active=active, differentiation=Counted())
    every = meta_step(case.model, nets, estimator, origin, lambda_, client, differentiation=Counted())
    steps = len(case.train)
    assert asked == [len(active)] * steps + [len(case.model.parameter_names)] * steps
    for name, gradient in every.gradients.items():
        close(few.gradients[name], gradient, 1e-10)
