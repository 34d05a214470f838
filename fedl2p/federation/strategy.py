"""Algorithm 1 as a Flower `Strategy`, for whoever drives rounds by Flower's own `strategy.start` or `flwr run`."""

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedl2p.federation.messages import META_LOSS, VAL_LOSS, from_arrays, to_arrays
from fedl2p.federation.rounds import (
    Federation,
    aggregate,
    combine_losses,
    training_messages,
    validation_messages,
)


class FedL2PStrategy(Strategy):
    """Passes Flower's calls on to `fedl2p.federation.rounds`; Flower's loop keeps the last lambda, not the best one."""

    def __init__(self, federation: Federation) -> None:
        """Takes what `set_up` made.

        Args:
            federation: who takes part, and how.
        """
        self.federation = federation
        self._sent = federation.initial

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Lambda to a sample of the participants."""
        self._sent = from_arrays(arrays, self.federation.initial)
        return training_messages(self.federation, self._sent, server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new lambda."""
        training = aggregate(self.federation, self._sent, server_round, replies)
        clients = [participant.client_id for participant in training.clients]
        return to_arrays(training.lambda_), MetricRecord({META_LOSS: training.meta_loss, "clients": clients})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The new lambda to the fixed validation cohort."""
        return validation_messages(self.federation, from_arrays(arrays, self.federation.initial), server_round)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The cohort's validation loss."""
        return MetricRecord({VAL_LOSS: combine_losses(self.federation, server_round, replies).loss})

    def summary(self) -> None:
        """Nothing is printed: the callbacks show a run."""
