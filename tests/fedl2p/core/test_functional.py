"""A model as a pure function: names, modes, and validation losses."""

import math

import torch
from core_cases import ConvNet, close, conv_case, image_batches, make_case, seeded

from fedl2p.core.functional import FunctionalModel, expected_error


def test_functional_model_reads_names_in_definition_order() -> None:
    model = conv_case().model
    assert isinstance(model, FunctionalModel)
    assert model.batchnorm_names == ("bn1", "bn2")
    assert model.parameter_names == tuple(name for name, _ in model.module.named_parameters())


def test_batch_statistics_can_be_taken_in_evaluation_without_dropout() -> None:
    case = make_case(seeded(lambda: ConvNet(dropout=0.5)), image_batches(5), image_batches(5))
    plain = seeded(ConvNet).train()
    outputs, _ = case.model(*case.start, torch.ones(2).double(), case.val[0][0], training=False, batch_statistics=True)
    close(outputs, plain(case.val[0][0]).detach(), 1e-11)


def test_the_expected_error_is_the_mean_probability_of_wrong_answers() -> None:
    outputs = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [0.0, 1000.0]], dtype=torch.float64)
    targets = torch.tensor([0, 0, 0])
    # 1/2, 1/4, and 1 for the answer that is surely wrong.
    torch.testing.assert_close(expected_error(outputs, targets), torch.tensor(1.75 / 3, dtype=torch.float64))
