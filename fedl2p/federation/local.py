"""Engine `local`: Flower's Grid inside this process; no server, no Ray."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

# Flower lets messages be made inside a run only, and has no public way to say that one is on (tested).
from flwr.supercore.task_identity import TaskIdentity

from fedl2p.federation.client_app import CohortHandler, error_reply
from fedl2p.federation.messages import PARTITION

_RUN_ID = 1
_SERVER_NODE = 1
_FIRST_CLIENT_NODE = 2
_TOGETHER = 256  # messages that cohorts are made of; more would only take memory


@contextmanager
def flower_run() -> Iterator[None]:
    """While this is open, `Message(...)` can be made in this process."""
    before = (TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN_ID, _SERVER_NODE, _RUN_ID
    try:
        yield
    finally:
        TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = before


class LocalGrid(Grid):
    """Carries messages to a ClientApp in this process, one node a client.

    Messages of a type that has a cohort handler go to it together; where it fails, each goes to the app by itself, so
    that one client's error is one error reply.
    """

    def __init__(
        self,
        app: ClientApp,
        client_ids: Iterable[int],
        *,
        cohort_handlers: dict[str, CohortHandler] | None = None,
    ) -> None:
        """Sets the nodes up.

        Args:
            app: answers for every client.
            client_ids: one node each; the app reads it as the partition of its context.
            cohort_handlers: by message type.
        """
        self._app = app
        self._cohort_handlers = dict(cohort_handlers or {})
        self._run = Run.create_empty(_RUN_ID)
        self._contexts: dict[int, Context] = {}
        for node_id, client_id in enumerate(sorted(client_ids), start=_FIRST_CLIENT_NODE):
            self._contexts[node_id] = Context(
                run_id=_RUN_ID,
                node_id=node_id,
                node_config={PARTITION: client_id},
                state=RecordDict(),
                run_config={},
            )
        self._replies: dict[str, Message] = {}
        self._sent = 0

    def set_run(self, run: Run) -> None:
        """Takes over a run's description."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run's description."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes, in the order of their client ids."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answers at once; the replies wait for `pull_messages`."""
        batch = list(messages)
        for message in batch:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = f"local-{self._sent}"
        by_type: dict[str, list[Message]] = {}
        for message in batch:
            by_type.setdefault(message.metadata.message_type, []).append(message)
        for message_type, group in by_type.items():
            for message, answer in zip(group, self._answer(message_type, group), strict=True):
                self._replies[message.metadata.message_id] = answer
        return [message.metadata.message_id for message in batch]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to the given messages, each once."""
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Both, a part of the messages at a time, so that not all replies have to be in memory at once.

        A timeout has no meaning here, since clients run in this process.
        """
        rest = iter(messages)
        while part := list(islice(rest, _TOGETHER if self._cohort_handlers else 1)):
            yield from self.pull_messages(self.push_messages(part))

    def _answer(self, message_type: str, messages: Sequence[Message]) -> list[Message]:
        contexts = [self._contexts[message.metadata.dst_node_id] for message in messages]
        handler = self._cohort_handlers.get(message_type)
        if handler is not None and len(messages) > 1:
            try:
                return handler(messages, contexts)
            except Exception:  # one client of the cohort; which one, the app finds out below
                pass
        return [self._alone(message, context) for message, context in zip(messages, contexts, strict=True)]

    def _alone(self, message: Message, context: Context) -> Message:
        try:
            return self._app(message, context)
        except Exception as error:
            return error_reply(message, error)
