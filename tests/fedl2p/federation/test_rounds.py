"""Algorithm 1 on a tiny federation: both ways to run clients, repetition, faults, the best lambda, and resuming."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from core_cases import ConvNet, seeded
from torch import Tensor
from torch.utils.data import TensorDataset

from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.hypergradients import Unrolled
from fedl2p.core.meta_nets import MetaNets
from fedl2p.core.settings import LearnerSettings
from fedl2p.datamodules.base.federated import ClientData, FederatedDataModule
from fedl2p.errors import ConfigError, FederationError
from fedl2p.federation import rounds
from fedl2p.federation.checkpoint import load_state, save_state
from fedl2p.federation.client_app import make_client_app, make_cohort_handlers
from fedl2p.federation.local import LocalGrid, flower_run
from fedl2p.federation.messages import from_arrays, to_arrays
from fedl2p.federation.rounds import Validation, new_state, run_rounds, set_up
from fedl2p.federation.runtime import ClientRuntime, quiet_trainer
from fedl2p.federation.settings import RoundSettings
from fedl2p.federation.state import MetaState, RoundCallback, RoundRecord
from fedl2p.federation.strategy import FedL2PStrategy

# Lightning's own: small loaders, and a name that it still uses and torch has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*max_epochs. was not set"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
]

Broken = Callable[[int, str, int], bool]


@pytest.fixture(autouse=True)
def run() -> Iterator[None]:
    with flower_run():
        yield


class Tiny(FederatedDataModule):
    """Six seen clients of unequal size, shifted by different amounts; images 1x4x4, 3 classes."""

    num_classes = 3
    sizes = (4, 7, 4, 9, 12, 7)

    def build_clients(self) -> Iterable[ClientData]:
        for number, size in enumerate(self.sizes):
            yield ClientData(
                name=f"c{number}",
                pool="seen",
                train=self.images(size, number, 10 * number),
                val=self.images(3 + number % 2, number, 10 * number + 1),
                test=self.images(4, number, 10 * number + 2),
            )

    @staticmethod
    def images(count: int, shift: int, seed: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        inputs = shift / 3 + (1 + shift / 4) * torch.randn(count, 1, 4, 4, generator=generator)
        return TensorDataset(inputs, torch.randint(3, (count,), generator=generator))


class Faulty(ClientRuntime):
    """A runtime in which `breaks(client_id, work, round)` decides who raises; work is `train` or `evaluate`."""

    breaks: Broken = staticmethod(lambda client_id, work, number: False)
    number = 0

    def meta_update(self, lambdas: Any, client_ids: Any, round_number: int, **options: Any) -> Any:
        self.number = round_number
        self._raise(client_ids, "train")
        return super().meta_update(lambdas, client_ids, round_number, **options)

    def evaluate(self, recipes: Any, client_ids: Any, **options: Any) -> Any:
        self._raise(client_ids, "evaluate")
        return super().evaluate(recipes, client_ids, **options)

    def _raise(self, client_ids: list[int], work: str) -> None:
        for client_id in client_ids:
            if self.breaks(client_id, work, self.number):
                raise ArithmeticError(f"client {client_id} cannot")


class Federation:
    """Everything that rounds need."""

    def __init__(self, *, runtime: dict[str, Any] | None = None, **settings: Any) -> None:
        data = Tiny(batch_size=6)
        model = convert_batchnorm(seeded(ConvNet).float())
        torch.manual_seed(5)
        options: dict[str, Any] = {
            "meta_iterations": 2,
            "finetune_epochs": 1,
            "meta_lr": {"bn_net": 0.1, "lr_net": 0.1, "base_lr": 0.02},
            **(runtime or {}),
        }
        learns = {name: options.pop(name) for name in LearnerSettings().as_dict() if name in options}
        options = {"estimator": Unrolled(), "settings": LearnerSettings.of(**learns), "seed": 3, **options}
        self.runtime = Faulty(data, model, MetaNets(model, base_lr=0.1), **options)
        handlers = make_cohort_handlers(self.runtime)
        self.grid = LocalGrid(make_client_app(self.runtime), data.pool("seen"), cohort_handlers=handlers)
        self.settings = RoundSettings(**{"client_fraction": 0.5, "seed": 3, **settings})
        names = {i: data.clients[i].name for i in data.pool("seen")}
        self.federation = set_up(self.grid, self.runtime.meta_nets, names, self.settings)
        self.start = self.runtime.lambda_()

    def run(self, rounds: int = 2, patience: int = 100, state: MetaState | None = None, **options: Any) -> MetaState:
        settings = replace(self.settings, rounds=rounds, patience=patience)
        federation = replace(self.federation, settings=settings)
        return run_rounds(self.grid, federation, state or new_state(federation), **options)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def losses(state: MetaState) -> list[float]:
    return [record.val_loss for record in state.history]


# One lambda


def test_the_same_seed_gives_the_same_lambda_bit_for_bit() -> None:
    first, second = Federation().run(), Federation().run()
    assert same(first.lambda_, second.lambda_)
    assert same(first.best_lambda, second.best_lambda)
    assert losses(first) == losses(second)
    assert not same(first.lambda_, Federation().start)


def test_another_seed_gives_another_lambda() -> None:
    first = Federation().run(1)
    second = Federation(runtime={"seed": 4}).run(1)
    assert not same(first.lambda_, second.lambda_)


def test_the_random_state_of_the_process_does_not_matter() -> None:
    federation, other = Federation(), Federation()
    torch.manual_seed(123)
    first = federation.run(1)
    torch.manual_seed(456)
    assert same(first.lambda_, other.run(1).lambda_)


def test_cohorts_of_any_size_give_one_lambda() -> None:
    large = Federation(client_fraction=1.0).run(1)
    small = Federation(runtime={"cohort_size": 2}, client_fraction=1.0).run(1)
    for name, tensor in large.lambda_.items():
        torch.testing.assert_close(small.lambda_[name], tensor, rtol=0, atol=1e-5)
    assert losses(small) == pytest.approx(losses(large), abs=1e-5)


@pytest.mark.parametrize(
    ("iterations", "statistics"),
    [(1, "running"), (3, "running"), (3, "batch")],
)
def test_a_cohort_and_clients_in_a_trainer_give_one_lambda(iterations: int, statistics: str) -> None:
    options: dict[str, Any] = {
        "meta_iterations": iterations,
        "finetune_epochs": 2,
        "evaluation_statistics": statistics,
    }
    cohort = Federation(runtime=options, client_fraction=1.0).run()
    for one_by_one in ({"cohort_size": 1}, {"trainer": {}}):
        alone = Federation(runtime=options | one_by_one, client_fraction=1.0).run()
        for name, tensor in cohort.lambda_.items():
            torch.testing.assert_close(alone.lambda_[name], tensor, rtol=0, atol=1e-5)
        assert losses(alone) == pytest.approx(losses(cohort), abs=1e-5)


@pytest.mark.parametrize("limit", [{}, {"train": 1, "val": 1}], ids=str)
def test_a_cohort_and_clients_in_a_trainer_that_does_not_validate_give_one_lambda(limit: dict[str, Any]) -> None:
    options: dict[str, Any] = {"meta_iterations": 3, "limits": limit}
    cohort = Federation(runtime=options, client_fraction=1.0).run()
    alone = Federation(runtime=options | {"trainer": {"check_val_every_n_epoch": 100}}, client_fraction=1.0).run()
    for name, tensor in cohort.lambda_.items():
        torch.testing.assert_close(alone.lambda_[name], tensor, rtol=0, atol=1e-5)
    assert losses(alone) == pytest.approx(losses(cohort), abs=1e-5)


class Half:
    """A CPU in half precision; Lightning's Fabric has float16 on GPUs only."""

    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=self.dtype)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_full_precision(autocast: torch.dtype) -> None:
    full = Federation(client_fraction=1.0).run()
    half = Federation(runtime={"fabric": Half(autocast)}, client_fraction=1.0).run()
    for name, tensor in half.lambda_.items():
        assert tensor.dtype == torch.float32
        moved = float((full.lambda_[name] - Federation().start[name]).abs().max())
        torch.testing.assert_close(tensor, full.lambda_[name], rtol=0, atol=0.2 * moved + 1e-7)
    assert losses(half) == pytest.approx(losses(full), rel=0.02)
    assert not same(half.lambda_, full.lambda_)


def test_half_precision_gives_one_lambda_in_a_cohort_and_in_a_trainer() -> None:
    """Sums in half precision depend on their order, and a cohort sums in another one; so they agree to its rounding."""
    cohort = Federation(runtime={"fabric": Half(torch.bfloat16)}, client_fraction=1.0).run()
    options: dict[str, Any] = {"fabric": Half(torch.bfloat16), "trainer": {"precision": "bf16-mixed"}}
    alone = Federation(runtime=options, client_fraction=1.0).run()
    for name, tensor in cohort.lambda_.items():
        moved = float((tensor - Federation().start[name]).abs().max())
        torch.testing.assert_close(alone.lambda_[name], tensor, rtol=0, atol=0.1 * moved + 1e-7)


@pytest.mark.parametrize("cohort_size", [2, None])
def test_large_networks_have_the_format_and_the_kernels_that_suit_them(
    monkeypatch: pytest.MonkeyPatch, cohort_size: int | None
) -> None:
    plain = Federation(client_fraction=1.0, runtime={"cohort_size": cohort_size})
    monkeypatch.setattr("fedl2p.core.cohort.CPU_COHORT_VALUES", 1)
    large = Federation(client_fraction=1.0, runtime={"cohort_size": cohort_size})
    assert [federation.runtime.learner.single.fused_batchnorm for federation in (plain, large)] == [False, True]
    weights = [federation.runtime.model.module.conv2.weight for federation in (plain, large)]
    assert [w.is_contiguous(memory_format=torch.channels_last) for w in weights] == [False, True]
    expected = plain.run().lambda_
    for name, tensor in large.run().lambda_.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


def test_a_round_is_the_weighted_mean_of_each_client_s_own_update() -> None:
    federation = Federation(client_fraction=1.0)
    after = federation.run(1).lambda_
    runtime, total = federation.runtime, sum(Tiny.sizes)
    mean = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in after.items()}
    for client_id, size in enumerate(Tiny.sizes):
        (own,) = runtime.meta_update([federation.start], [client_id], 1)
        for name in mean:
            mean[name] += size / total * own.lambda_[name]
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, mean[name].float(), rtol=0, atol=1e-5)


def test_updates_in_a_trainer_leave_the_runtime_s_nets_and_model_as_they_were() -> None:
    federation = Federation(runtime={"trainer": {}, "meta_iterations": 1})
    model = {name: t.clone() for name, t in federation.runtime.model.module.state_dict().items()}
    nets = {name: t.clone() for name, t in federation.runtime.meta_nets.state_dict().items()}
    federation.run(1)
    assert same(dict(federation.runtime.model.module.state_dict()), model)
    assert same(dict(federation.runtime.meta_nets.state_dict()), nets)


def test_double_precision_in_the_trainer_lasts_as_long_as_the_fit() -> None:
    federation = Federation(
        runtime={"cohort_size": 1, "meta_iterations": 1, "trainer": {"precision": "64-true"}}, client_fraction=0.2
    )
    state = federation.run(1)
    assert {t.dtype for t in state.lambda_.values()} == {torch.float32}
    assert state.history[1].failures == {}
    assert {p.dtype for p in federation.runtime.meta_nets.parameters()} == {torch.float32}


def test_standardized_inputs_have_mean_0_and_sd_1_over_participants() -> None:
    federation = Federation()
    participants = federation.federation.participants
    net = federation.runtime.meta_nets.lr_net
    inputs = torch.stack([p.layer_moments for p in participants])
    scaled = (net.transform(inputs) - net.input_shift) / net.input_scale
    torch.testing.assert_close(scaled.mean(0), torch.zeros(scaled.shape[1]), rtol=0, atol=1e-5)
    spread = scaled.std(0, correction=0)
    assert ((spread - 1).abs() < 1e-4).logical_or(spread < 1e-4).all()


# Faults


@pytest.mark.parametrize("cohort_size", [64, 1])
def test_a_client_that_raises_is_left_out_and_the_others_count(cohort_size: int) -> None:
    options: dict[str, Any] = {"cohort_size": cohort_size, "meta_iterations": 1}
    federation = Federation(runtime=options, client_fraction=1.0)
    federation.runtime.breaks = lambda client_id, work, number: (client_id, work) == (3, "train")
    state = federation.run(1)
    record = state.history[1]
    assert record.clients == ("c0", "c1", "c2", "c4", "c5")
    assert set(record.failures) == {"c3"}
    assert "ArithmeticError" in record.failures["c3"]
    assert "client 3 cannot" in record.failures["c3"]
    others = [i for i in range(6) if i != 3]
    weights = {i: Tiny.sizes[i] / sum(Tiny.sizes[j] for j in others) for i in others}
    updates = Federation(runtime=options).runtime
    own = {i: updates.meta_update([federation.start], [i], 1)[0].lambda_ for i in others}
    for name, tensor in state.lambda_.items():
        # The nets' input scale is the same for all, so the updates can be made apart.
        expected = sum((weights[i] * own[i][name].double() for i in others), torch.zeros((), dtype=torch.float64))
        torch.testing.assert_close(tensor, expected.float(), rtol=0, atol=1e-5)


def test_too_few_good_clients_end_the_rounds_with_the_reason() -> None:
    federation = Federation(client_fraction=1.0)
    federation.runtime.breaks = lambda client_id, work, number: client_id != 0 and work == "train"
    state = new_state(federation.federation)
    with pytest.raises(FederationError, match=r"Round 1: 1 of 6.*3 are needed.*client 1 cannot"):
        federation.run(3, state=state)
    assert state.round == 0


def test_a_client_that_fails_in_validation_is_named_as_such() -> None:
    federation = Federation(client_fraction=1.0)
    federation.runtime.breaks = lambda client_id, work, number: (client_id, work, number) == (2, "evaluate", 1)
    record = federation.run(1).history[1]
    assert list(record.failures) == ["c2 (validation)"]
    assert math.isfinite(record.val_loss)


def test_a_client_that_fails_in_the_first_validation_is_named_too() -> None:
    federation = Federation()
    federation.runtime.breaks = lambda client_id, work, number: (client_id, work, number) == (2, "evaluate", 0)
    assert list(federation.run(0).history[0].failures) == ["c2 (validation)"]


def test_steps_that_are_not_finite_are_counted() -> None:
    class Never(Unrolled):
        def __call__(self, *args: Any, **options: Any) -> Any:
            estimate = super().__call__(*args, **options)
            return estimate._replace(eta=estimate.eta * torch.nan)

    state = Federation(runtime={"estimator": Never()}, client_fraction=0.5).run(1)
    assert state.history[1].skipped_steps == 3 * 2
    assert same(state.lambda_, state.best_lambda)


# Flower's own loop


def test_flower_s_own_loop_gives_the_same_lambda_bit_for_bit() -> None:
    federation = Federation()
    expected = federation.run(2)
    other = Federation()
    settings = replace(other.settings, rounds=2)
    strategy = FedL2PStrategy(replace(other.federation, settings=settings))
    result = strategy.start(other.grid, to_arrays(other.start), num_rounds=2)
    assert same(from_arrays(result.arrays, other.start), expected.lambda_)
    measured = [result.evaluate_metrics_clientapp[number]["val-loss"] for number in (1, 2)]
    assert measured == losses(expected)[1:]
    assert [result.train_metrics_clientapp[number]["meta-loss"] for number in (1, 2)] == [
        record.meta_loss for record in expected.history[1:]
    ]


# The best lambda


class Scripted(Federation):
    """Validation losses as given, one a round from round 0 on."""

    def __init__(self, script: list[float]) -> None:
        super().__init__(runtime={"meta_iterations": 1, "finetune_epochs": 1}, client_fraction=0.2)
        self.remaining = iter(script)

    def run(self, *args: Any, **options: Any) -> MetaState:
        def validate(*args: Any) -> Validation:
            loss = next(self.remaining)
            return Validation(loss=loss, typical=loss, failures={})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rounds, "validate", validate)
            return super().run(*args, **options)


class Recorder(RoundCallback):
    """Keeps what happened, and a copy of lambda by round; raises at the end of a round if told."""

    def __init__(self, fail_at: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.events: list[Any] = []
        self.lambdas: dict[int, dict[str, Tensor]] = {}
        self.fail_at, self.error = fail_at, error

    def on_rounds_start(self, state: MetaState, rounds: int) -> None:
        self.events.append(("start", state.round, rounds))

    def on_round_end(self, state: MetaState, record: RoundRecord) -> None:
        self.events.append(record.round)
        self.lambdas[record.round] = {name: t.clone() for name, t in state.lambda_.items()}
        if record.round == self.fail_at:
            raise self.error

    def on_rounds_end(self, state: MetaState) -> None:
        self.events.append("end")


def test_the_best_lambda_is_that_of_the_lowest_validation_loss() -> None:
    recorder = Recorder()
    state = Scripted([3.0, 2.0, 1.0, 1.5, 1.0]).run(4, callbacks=[recorder])
    assert (state.best_round, state.best_loss) == (2, 1.0)
    assert same(state.best_lambda, recorder.lambdas[2])
    assert same(state.lambda_, recorder.lambdas[4])
    assert not same(state.lambda_, state.best_lambda)


def test_the_initial_lambda_can_be_the_best() -> None:
    federation = Scripted([1.0, 2.0, 2.0])
    assert same(federation.run(2).best_lambda, federation.start)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_round_whose_loss_is_not_finite_is_never_the_best(bad: float) -> None:
    state = Scripted([bad, bad, 5.0, bad]).run(3)
    assert (state.best_round, state.best_loss) == (2, 5.0)
    never = Scripted([bad, bad]).run(1)
    assert never.best_round == 0
    assert same(never.best_lambda, Federation().start)


@pytest.mark.parametrize("bad", [30.0, math.inf])
def test_a_ruined_round_is_rolled_back_to_the_best_lambda_and_said(bad: float) -> None:
    recorder = Recorder()
    state = Scripted([3.0, 2.0, 2.5, bad, 2.2]).run(4, callbacks=[recorder])
    assert [record.rolled_back for record in state.history] == [False, False, False, True, False]
    assert same(recorder.lambdas[3], recorder.lambdas[1])
    assert not same(recorder.lambdas[2], recorder.lambdas[1])
    assert not same(recorder.lambdas[4], recorder.lambdas[3])


def test_a_round_after_a_ruined_one_goes_on_from_the_best_lambda_after_a_restart_too(tmp_path: Path) -> None:
    script = [3.0, 2.0, 30.0, 2.2, 2.1]
    whole = Scripted(script).run(4)
    save_state(tmp_path, Scripted(script).run(2))
    stored = load_state(tmp_path)
    assert stored is not None
    assert stored.history[2].rolled_back
    assert same(Scripted(script[3:]).run(4, state=stored).lambda_, whole.lambda_)


def test_patience_ends_the_rounds() -> None:
    state = Scripted([3.0, 2.0, 2.5, 2.5, 2.5, 0.1]).run(50, patience=3)
    assert (state.round, state.best_round) == (4, 1)
    state = Scripted([3.0, 2.0, 2.5, 1.5, 2.5, 2.5]).run(50, patience=2)
    assert (state.round, state.best_round) == (5, 3)


def test_a_patience_below_1_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"federation\.patience is 0"):
        Federation().run(1, patience=0)


def test_no_rounds_measure_the_initial_lambda_only() -> None:
    federation = Federation()
    state = federation.run(0)
    assert state.round == 0
    assert same(state.lambda_, federation.start)


def test_validation_is_of_the_aggregated_lambda() -> None:
    federation = Federation()
    state = federation.run(1)
    recipes = [federation.runtime.recipe(state.lambda_, i) for i in range(6)]
    measured = federation.runtime.evaluate(recipes, list(range(6)))
    expected = sum(n * m["val"].loss for n, m in zip(Tiny.sizes, measured, strict=True)) / sum(Tiny.sizes)
    assert state.history[1].val_loss == pytest.approx(expected, abs=1e-6)


# Callbacks and resuming


def test_callbacks_are_called_in_order() -> None:
    recorder = Recorder()
    saved: list[int] = []
    Federation().run(2, callbacks=[recorder], save=lambda state: saved.append(state.round))
    assert recorder.events == [("start", -1, 2), 0, 1, 2, "end"]
    assert saved == [0, 1, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_callbacks_learn_of_the_end_after_an_error_too(error: type[BaseException]) -> None:
    failing, watching = Recorder(fail_at=1, error=error), Recorder()
    with pytest.raises(error):
        Federation().run(3, callbacks=[watching, failing])
    assert watching.events == [("start", -1, 3), 0, 1, "end"]
    assert failing.events[-1] == "end"


@pytest.mark.parametrize("last", [0, 1, 2])
def test_interrupted_rounds_that_are_resumed_give_the_same_lambda_bit_for_bit(tmp_path: Path, last: int) -> None:
    whole = Federation().run(3)

    def save(state: MetaState) -> None:
        save_state(tmp_path, state)

    with pytest.raises(KeyboardInterrupt):
        Federation().run(3, callbacks=[Recorder(fail_at=last)], save=save)
    state, recorder = load_state(tmp_path), Recorder()
    assert state is not None
    assert state.round == last
    resumed = Federation().run(3, state=state, callbacks=[recorder], save=save)
    assert recorder.events == [("start", last, 3), *range(last + 1, 4), "end"]
    assert same(resumed.lambda_, whole.lambda_)
    assert same(resumed.best_lambda, whole.best_lambda)
    assert losses(resumed) == losses(whole)
    assert [record.clients for record in resumed.history] == [record.clients for record in whole.history]


def test_a_finished_state_runs_no_further_round() -> None:
    federation = Federation()
    state = federation.run(1)
    recorder = Recorder()
    federation.run(1, state=state, callbacks=[recorder])
    assert recorder.events == [("start", 1, 1), "end"]


# The runtime


def test_statistics_are_collected_once_a_client() -> None:
    runtime = Federation().runtime
    assert runtime.statistics(2) is runtime.statistics(2)
    assert runtime.statistics(2).num_samples == Tiny.sizes[2]


def test_personalization_uses_one_fixed_order_of_batches() -> None:
    runtime = Federation().runtime
    recipe = runtime.recipe(runtime.lambda_(), 4)
    first, second = (runtime.evaluate([recipe], [4])[0]["val"] for _ in range(2))
    assert torch.equal(first.outputs, second.outputs)
    other = Federation().runtime.evaluate([recipe], [4])[0]["val"]
    assert torch.equal(first.outputs, other.outputs)


def test_meta_iterations_see_the_data_in_new_orders() -> None:
    runtime = Federation().runtime
    tasks = runtime.meta_episodes(4, "meta", 1)
    assert len(tasks) == 2
    orders = [torch.cat([y for _, y in task.train_batches]).tolist() for task in tasks]
    assert len({tuple(order) for order in orders}) == 2
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_arguments_reach_the_trainer_and_win_over_the_quiet_ones() -> None:
    trainer = quiet_trainer({"precision": "64-true", "limit_train_batches": 3, "num_sanity_val_steps": 1})
    assert (trainer.precision, trainer.limit_train_batches, trainer.num_sanity_val_steps) == ("64-true", 3, 1)
    assert trainer.logger is None
