"""The inner loop: plain SGD on an ordinary model is the reference; nothing that a caller holds is written to."""

import copy
from dataclasses import replace

import pytest
import torch
from core_cases import (
    ConvNet,
    PictureAndAge,
    close,
    conv_case,
    image_batches,
    make_case,
    named_inputs_case,
    seeded,
    unchanged,
)
from torch import Tensor, nn

from fedl2p.core.batchnorm import ForwardMode
from fedl2p.core.differentiation import FUNC_TRANSFORMS, Autograd, Differentiation
from fedl2p.core.finetune import active_parameters, evaluate, evaluation_loss, finetune, initial_running, to_model
from fedl2p.core.functional import FunctionalModel, InnerState
from fedl2p.core.settings import BatchNormMode, RunningStart
from fedl2p.core.statistics import collect_statistics
from fedl2p.errors import ConfigError, ModelError

WAYS = [pytest.param(FUNC_TRANSFORMS, id="torch.func"), pytest.param(Autograd(), id="torch.autograd")]


def ordinary(case_module: nn.Module, start: InnerState) -> nn.Module:
    """The plain torch model in the state that fine-tuning starts from."""
    model = copy.deepcopy(case_module)
    state = {n: t for n, t in {**start.parameters, **start.buffers}.items() if n in model.state_dict()}
    model.load_state_dict(state, strict=False)
    return model.train()


def assert_equals_module(state: InnerState, module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        close(state.parameters[name], parameter.detach(), 1e-10)
    for name, buffer in module.named_buffers():
        if not name.endswith("num_batches_tracked") or name in state.buffers:
            close(state.buffers[name].double(), buffer.double(), 1e-10)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_beta_1_equals_torch_sgd_with_a_rate_for_each_tensor_on_the_ordinary_model(momentum: float | None) -> None:
    plain = seeded(lambda: ConvNet(momentum))
    case = make_case(plain, image_batches(5, 4, 6, 3), image_batches(4))
    eta = case.eta.abs()
    model = ordinary(plain, case.start)
    optimizer = torch.optim.SGD([{"params": [p], "lr": float(r)} for p, r in zip(model.parameters(), eta, strict=True)])
    losses = []
    for inputs, targets in case.train:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    tuned = finetune(case.model, case.start, case.train, torch.ones(2).double(), eta)
    assert_equals_module(tuned.final, model)
    close(tuned.losses, torch.stack(losses), 1e-11)


def test_negative_rates_climb() -> None:
    case = conv_case(steps=1)
    eta = -case.eta.abs()
    down = finetune(case.model, case.start, case.train, case.beta, -eta).final
    up = finetune(case.model, case.start, case.train, case.beta, eta).final
    for name, origin in case.start.parameters.items():
        close(up.parameters[name] - origin, origin - down.parameters[name], 1e-10)


def test_nothing_that_the_caller_holds_is_changed() -> None:
    case = conv_case()
    module_state = case.model.module.state_dict()
    with unchanged(case.start, case.train, case.val, case.beta, case.eta, module_state):
        tuned = case.tune(history=2)
        evaluation_loss(case.model, tuned.final, case.beta, case.val)
    assert set(tuned.final.buffers) == set(case.start.buffers)
    assert list(tuned.final.parameters) == list(case.model.parameter_names)


def test_no_graph_is_kept_even_when_beta_and_eta_have_one() -> None:
    case = conv_case()
    tuned = finetune(
        case.model, case.start, case.train, case.beta.requires_grad_(), case.eta.requires_grad_(), history=1
    )
    tensors = [*tuned.final.parameters.values(), *tuned.final.buffers.values(), tuned.losses]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_active_parameters_are_the_tensors_with_a_rate_and_skipping_the_others_changes_nothing() -> None:
    case = conv_case()
    names = active_parameters(case.model, case.eta)
    assert names == tuple(n for n in case.model.parameter_names if n != "bn1.weight")
    full = case.tune()
    skipping = finetune(case.model, case.start, case.train, case.beta, case.eta, active=names)
    for part in range(2):
        for name, value in full.final[part].items():
            assert torch.equal(value, skipping.final[part][name]), name
    assert list(skipping.final.parameters) == list(full.final.parameters)
    assert torch.equal(full.losses, skipping.losses)


def test_active_parameters_of_a_cohort_are_those_of_any_client() -> None:
    model = conv_case().model
    eta = torch.zeros(3, 9)
    eta[0, 2], eta[2, 7] = 0.1, -1e-20
    assert active_parameters(model, eta) == ("bn1.bias", "fc.weight")
    assert active_parameters(model, torch.zeros(9)) == ()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("fused", [False, True])
def test_steps_by_autograd_are_the_steps(momentum: float | None, fused: bool) -> None:
    case = conv_case(momentum=momentum)
    by_autograd = case._replace(differentiation=Autograd(fused_batchnorm=fused))
    expected, names = case.tune(history=2), active_parameters(case.model, case.eta)
    skipping = finetune(
        case.model,
        case.start,
        case.train,
        case.beta,
        case.eta,
        history=2,
        active=names,
        differentiation=by_autograd.differentiation,
    )
    with unchanged(*case.start), torch.no_grad():
        tuned = by_autograd.tune(history=2)
    for actual in (tuned, skipping):
        close(actual.losses, expected.losses, 1e-12)
        pairs = zip((actual.final, *actual.history), (expected.final, *expected.history), strict=True)
        for state, other in pairs:
            for part in range(2):
                for name, value in other[part].items():
                    close(state[part][name], value, 1e-12)
                    assert not state[part][name].requires_grad
    assert all(layer.forward_mode == ForwardMode() for layer in case.model._layers)


def test_steps_by_autograd_work_in_inference_mode_and_with_a_parameter_that_is_not_used() -> None:
    class Idle(ConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Parameter(torch.ones(2))

    case = make_case(seeded(Idle), image_batches(4, 5), image_batches(4))
    by_autograd = case._replace(differentiation=Autograd(fused_batchnorm=True))
    expected = case.tune().final.parameters
    with torch.inference_mode():
        inferred = by_autograd.tune().final
    going_on = by_autograd._replace(start=inferred).tune().final.parameters
    close(
        going_on["fc.bias"], finetune(case.model, case.tune().final, case.train, case.beta, case.eta)[0][0]["fc.bias"]
    )
    for actual in (by_autograd.tune().final.parameters, inferred.parameters):
        assert torch.equal(actual["idle"], expected["idle"])
        for name, value in expected.items():
            close(actual[name], value, 1e-12)


@pytest.mark.parametrize("differentiation", WAYS)
def test_tensors_that_do_not_reach_the_loss_stay(differentiation: Differentiation) -> None:
    case = conv_case()
    model = replace(case.model, loss_fn=lambda outputs, targets: torch.zeros((), dtype=outputs.dtype))
    tuned = case._replace(model=model, differentiation=differentiation).tune()
    assert all(torch.equal(tuned.final.parameters[name], p) for name, p in case.start.parameters.items())


@pytest.mark.parametrize("differentiation", WAYS)
def test_parameters_keep_their_type_whatever_that_of_the_rates(differentiation: Differentiation) -> None:
    model = FunctionalModel.of(nn.Linear(3, 2).to(torch.bfloat16))
    batch = torch.ones(4, 3, dtype=torch.bfloat16), torch.tensor([0, 1, 0, 1])
    state = InnerState(*model.tensors())

    def run(eta: Tensor) -> dict[str, Tensor]:
        beta = torch.zeros(0)
        return finetune(model, state, [batch, batch], beta, eta, differentiation=differentiation).final.parameters

    alone = isinstance(differentiation, Autograd)
    for tensor in (run(torch.ones(2)) if alone else torch.vmap(run)(torch.ones(2, 2))).values():
        assert tensor.dtype == torch.bfloat16


def test_without_a_rate_only_the_running_statistics_move() -> None:
    case = conv_case()
    tuned = finetune(case.model, case.start, case.train, case.beta, torch.zeros(9).double(), active=())
    full = finetune(case.model, case.start, case.train, case.beta, torch.zeros(9).double())
    assert len(tuned.losses) == 3
    for name, value in tuned.final.parameters.items():
        assert torch.equal(value, case.start.parameters[name])
    for name, value in tuned.final.buffers.items():
        assert torch.equal(value, full.final.buffers[name])
    assert not torch.equal(tuned.final.buffers["bn1.running_mean"], case.start.buffers["bn1.running_mean"])


@pytest.mark.parametrize("history", [0, 1, 2, 4, 9])
def test_history_holds_the_states_before_the_last_steps_oldest_first(history: int) -> None:
    case = conv_case(steps=4)
    tuned = case.tune(history=history)
    kept = min(history, 4)
    assert len(tuned.history) == kept
    for index, state in enumerate(tuned.history):
        expected = finetune(case.model, case.start, case.train[: 4 - kept + index], case.beta, case.eta).final
        for part in range(2):
            for name, value in expected[part].items():
                assert torch.equal(state[part][name], value)


def test_zero_batches_leave_everything_as_it_was() -> None:
    case = conv_case()
    tuned = finetune(case.model, case.start, [], case.beta, case.eta, history=1)
    assert tuned.final is case.start
    assert tuned.history == ()
    assert tuned.losses.shape == (0,)


def test_measured_start_is_the_clients_own_statistics_and_zero_one_is_0_and_1() -> None:
    case = conv_case(momentum=None)
    _, buffers = case.model.tensors()
    measured = initial_running(case.model, buffers, case.statistics)
    assert torch.equal(measured["bn2.running_mean"], case.statistics.channel_mean["bn2"])
    assert torch.equal(measured["bn2.running_var"], case.statistics.channel_var["bn2"])
    fresh = initial_running(case.model, buffers, case.statistics, start=RunningStart.zero_one)
    assert fresh["bn2.running_mean"].tolist() == [0, 0, 0]
    assert fresh["bn2.running_var"].tolist() == [1, 1, 1]
    assert fresh["bn2.num_batches_tracked"] == 0
    assert set(fresh) <= set(buffers)


def test_an_unknown_start_and_statistics_of_another_model_are_errors() -> None:
    case = conv_case()
    _, buffers = case.model.tensors()
    with pytest.raises(ConfigError, match=r"'pretrained'.*'measured' and 'zero_one'"):
        initial_running(case.model, buffers, case.statistics, start="pretrained")
    other = collect_statistics(nn.Linear(3, 2), [torch.randn(3, 3)])
    with pytest.raises(ModelError, match="another model"):
        initial_running(case.model, buffers, other)


def test_evaluation_loss_over_ragged_batches_is_the_mean_over_all_samples() -> None:
    case = conv_case()
    inputs, targets = (torch.cat(part) for part in zip(*image_batches(5, 1, 7), strict=True))
    ragged = list(zip(inputs.split([5, 1, 7]), targets.split([5, 1, 7]), strict=True))
    logits = case.model(*case.start, case.beta, inputs, training=False)[0]
    expected = nn.functional.cross_entropy(logits, targets)
    close(evaluation_loss(case.model, case.start, case.beta, ragged), expected, 1e-12)
    close(evaluation_loss(case.model, case.start, case.beta, [(inputs, targets)]), expected, 1e-12)


def test_evaluation_leaves_the_buffers_alone() -> None:
    case = conv_case()
    _, after = case.model(*case.start, case.beta, case.val[0][0], training=False)
    for name, value in case.start.buffers.items():
        assert torch.equal(after[name], value) or name.endswith(".beta")
    assert torch.equal(after["bn2.beta"], case.beta[1])


def test_a_model_with_dropout_trains_with_it_and_is_evaluated_without() -> None:
    case = make_case(seeded(lambda: ConvNet(dropout=0.5)), image_batches(5, 4), image_batches(4))
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(case.tune().final.parameters["fc.weight"])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    losses = [evaluation_loss(case.model, case.start, case.beta, case.val) for _ in range(2)]
    assert torch.equal(*losses)


def test_the_users_own_loss_over_a_sequence_equals_torch_sgd() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.bn = nn.BatchNorm1d(4)
            self.head = nn.Linear(4, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.relu(self.bn(self.embedding(tokens).mT)).mT)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.mT, targets, reduction="none").sum(1).mean()

    plain = seeded(Sequence)
    train = [(torch.randint(7, (n, 5)), torch.randint(2, (n, 5))) for n in (4, 3)]
    case = make_case(plain, train, train, loss_fn=loss_fn)
    model = ordinary(plain, case.start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for tokens, targets in train:
        optimizer.zero_grad()
        loss_fn(model(tokens), targets).backward()
        optimizer.step()
    tuned = finetune(case.model, case.start, train, torch.ones(1).double(), torch.full((5,), 0.2, dtype=torch.float64))
    assert_equals_module(tuned.final, model)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_inputs_that_the_model_itself_casts_may_have_any_type(dtype: torch.dtype) -> None:
    class Casting(ConvNet):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs.to(torch.float64))

    pictures = [((x > 0).to(dtype), y) for x, y in image_batches(5, 4)]
    case = make_case(seeded(Casting), pictures, pictures)
    floats = make_case(seeded(ConvNet), [(x.double(), y) for x, y in pictures], case.val)
    for name, value in floats.tune().final.parameters.items():
        assert torch.equal(value, case.tune().final.parameters[name])


# Inputs and outputs of several tensors


@pytest.mark.parametrize("differentiation", WAYS)
@pytest.mark.parametrize("by_name", [True, False])
def test_a_dict_or_a_tuple_of_inputs_equals_torch_sgd(by_name: bool, differentiation: Differentiation) -> None:
    case = named_inputs_case(by_name=by_name)
    model = ordinary(seeded(PictureAndAge), case.start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for inputs, targets in case.train:
        optimizer.zero_grad()
        outputs = model(**inputs) if by_name else model(*inputs)
        nn.functional.cross_entropy(outputs, targets).backward()
        optimizer.step()
    eta = torch.full_like(case.eta, 0.2)
    sgd = case._replace(beta=torch.ones(3).double(), eta=eta, differentiation=differentiation)
    with unchanged(case.start, case.train):
        assert_equals_module(sgd.tune().final, model)


@pytest.mark.parametrize("bn_mode", BatchNormMode)
@pytest.mark.parametrize("by_name", [True, False])
def test_a_dict_or_a_tuple_of_inputs_is_evaluated_over_all_samples(by_name: bool, bn_mode: BatchNormMode) -> None:
    case = named_inputs_case(by_name=by_name)
    keys = ["picture", "age"] if by_name else [0, 1]
    whole = [torch.cat([inputs[key] for inputs, _ in case.val]) for key in keys]
    targets = torch.cat([y for _, y in case.val])
    own = bn_mode is BatchNormMode.batch
    expected, _ = case.model(*case.start, case.beta, tuple(whole), training=False, batch_statistics=own)
    outputs, loss, val_loss = evaluate(case.model, case.start, case.beta, case.val, bn_mode=bn_mode)
    close(outputs, expected, 1e-12)
    close(loss, nn.functional.cross_entropy(expected, targets), 1e-12)
    close(val_loss, loss, 1e-12)
    close(evaluation_loss(case.model, case.start, case.beta, case.val, bn_mode=bn_mode), loss, 1e-12)


def test_outputs_and_targets_may_be_structures_too() -> None:
    class Heads(ConvNet):
        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            logits = super().forward(inputs)
            return {"kind": logits[:, :2], "size": logits[:, 2]}

    def loss_fn(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        size = nn.functional.mse_loss(outputs["size"], targets["size"])
        return nn.functional.cross_entropy(outputs["kind"], targets["kind"]) + size

    batches = [(x, {"kind": y, "size": x.mean((1, 2, 3))}) for x, y in image_batches(5, 2, 4, classes=2)]
    case = make_case(seeded(Heads), batches, batches, loss_fn=loss_fn)
    for bn_mode in BatchNormMode:
        outputs, loss, _ = evaluate(case.model, case.start, case.beta, case.val, bn_mode=bn_mode)
        assert {name: len(part) for name, part in outputs.items()} == {"kind": 11, "size": 11}
        close(evaluation_loss(case.model, case.start, case.beta, case.val, bn_mode=bn_mode), loss, 1e-12)
    assert case.tune().losses.shape == (3,)


def test_batches_of_any_structure_move_between_devices() -> None:
    case = named_inputs_case()
    moved = to_model(case.train, copy.deepcopy(case.model.module).to("meta", torch.float32))
    assert {tensor.device.type for inputs, targets in moved for tensor in (*inputs.values(), targets)} == {"meta"}
    floating = [t for inputs, _ in moved for t in inputs.values() if t.is_floating_point()]
    assert floating and {tensor.dtype for tensor in floating} == {torch.float32}
    assert {tensor.device.type for inputs, _ in case.train for tensor in inputs.values()} == {"cpu"}
