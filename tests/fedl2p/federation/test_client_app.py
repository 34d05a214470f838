"""What an honest client says where it diverges."""

import math

import pytest

from fedl2p.federation.client_app import bounded_loss
from fedl2p.federation.messages import MAX_LOSS
from fedl2p.federation.replies import loss_in_range


@pytest.mark.parametrize("loss", [0.0, 0.7, 1e5, MAX_LOSS])
def test_a_loss_in_range_is_said_as_it_is(loss: float) -> None:
    assert bounded_loss(loss) == loss


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e30])
def test_a_client_that_diverges_says_the_largest_loss_and_is_not_taken_for_a_liar(loss: float) -> None:
    assert bounded_loss(loss) == MAX_LOSS
    assert loss_in_range(bounded_loss(loss))
