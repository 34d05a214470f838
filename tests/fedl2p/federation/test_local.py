"""The engine `local`, with toy apps."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from fedl2p.federation import local
from fedl2p.federation.local import LocalGrid, flower_run
from fedl2p.federation.messages import METRICS, instruction, reply

KIND = "train.toy"


def make_app(answer: Callable[[int], float] = float) -> ClientApp:
    """Answers with a function of the client's id."""
    app = ClientApp()

    @app.train("toy")
    def train(message: Message, context: Context) -> Message:
        return reply(message, metrics={"value": answer(int(context.node_config["partition-id"]))})

    return app


def ask(grid: LocalGrid) -> dict[int, Message]:
    messages = [instruction(KIND, node, config={"server-round": 1}) for node in grid.get_node_ids()]
    return {message.metadata.src_node_id: message for message in grid.send_and_receive(messages)}


def value(message: Message) -> float:
    found = message.content.metric_records[METRICS]["value"]
    assert isinstance(found, float)
    return found


def identity() -> tuple[object, ...]:
    # Private to Flower: if this fails after an update of it, `flower_run` must change.
    return TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id


def test_flower_still_has_the_private_attributes_that_flower_run_sets() -> None:
    assert all(hasattr(TaskIdentity, name) for name in ("_run_id", "_node_id", "_task_id"))


def test_messages_can_be_made_in_a_run_only_and_the_identity_comes_back() -> None:
    before = identity()
    with flower_run():
        assert identity() != before
        instruction(KIND, 2, config={})
    assert identity() == before
    with pytest.raises(Exception, match="run_id"):
        instruction(KIND, 2, config={})


def test_the_identity_comes_back_after_an_error_and_when_runs_are_nested() -> None:
    before = identity()

    def failing() -> None:
        with flower_run():
            inside = identity()
            with flower_run():
                pass
            assert identity() == inside
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert identity() == before


def test_every_client_has_a_node_and_answers_for_itself() -> None:
    with flower_run():
        grid = LocalGrid(make_app(), [30, 10, 20])
        answers = ask(grid)
        assert [value(answers[node]) for node in grid.get_node_ids()] == [10, 20, 30]
        assert grid.get_node_ids() == grid.get_node_ids()


def test_replies_wait_until_they_are_pulled_and_are_given_once() -> None:
    with flower_run():
        grid = LocalGrid(make_app(), [0, 1])
        ids = list(grid.push_messages([instruction(KIND, node, config={}) for node in grid.get_node_ids()]))
        assert len(set(ids)) == 2
        assert [value(message) for message in grid.pull_messages(ids[:1])] == [0]
        assert [value(message) for message in grid.pull_messages(ids)] == [1]
        assert list(grid.pull_messages(ids)) == []


def test_a_client_that_raises_is_one_error_reply() -> None:
    with flower_run():
        answers = ask(LocalGrid(make_app(lambda client: 1 / (client - 1)), [0, 1, 2]))
    (error,) = [message.error for message in answers.values() if message.has_error()]
    assert error.code == 2
    assert "ZeroDivisionError" in str(error.reason)
    assert sum(not message.has_error() for message in answers.values()) == 2


def test_a_cohort_handler_gets_all_messages_of_its_type_at_once() -> None:
    sizes: list[int] = []

    def handler(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        sizes.append(len(messages))
        return [
            reply(message, metrics={"value": 100.0 + int(context.node_config["partition-id"])})
            for message, context in zip(messages, contexts, strict=True)
        ]

    with flower_run():
        grid = LocalGrid(make_app(), [5, 6, 7], cohort_handlers={KIND: handler})
        answers = ask(grid)
        assert [value(answers[node]) for node in grid.get_node_ids()] == [105, 106, 107]
    assert sizes == [3]


def test_where_a_cohort_fails_each_client_is_asked_alone() -> None:
    def handler(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        raise RuntimeError("one of them")

    with flower_run():
        grid = LocalGrid(make_app(lambda client: 1 / (client - 1)), [0, 1, 2], cohort_handlers={KIND: handler})
        answers = ask(grid)
        nodes = list(grid.get_node_ids())
        assert [answers[node].has_error() for node in nodes] == [False, True, False]
        assert value(answers[nodes[2]]) == 1.0


def test_an_interruption_is_not_taken_for_a_client_s_error() -> None:
    def interrupt(client: int) -> float:
        raise KeyboardInterrupt

    with flower_run(), pytest.raises(KeyboardInterrupt):
        ask(LocalGrid(make_app(interrupt), [0, 1]))


def test_cohorts_get_a_part_of_the_messages_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that not all replies have to be in memory at once: the first comes before the last message is made."""
    monkeypatch.setattr(local, "_TOGETHER", 3)
    asked: list[int] = []
    made: list[int] = []

    def handler(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        asked.append(len(messages))
        pairs = zip(messages, contexts, strict=True)
        return [reply(message, metrics={"value": float(context.node_id)}) for message, context in pairs]

    def instructions(nodes: Iterable[int]) -> Iterator[Message]:
        for node in nodes:
            made.append(node)
            yield instruction(KIND, node, config={})

    with flower_run():
        grid = LocalGrid(make_app(), range(8), cohort_handlers={KIND: handler})
        answers = iter(grid.send_and_receive(instructions(grid.get_node_ids())))
        first = next(answers)
        assert value(first) == 2 and made == [2, 3, 4]
        assert [value(message) for message in answers] == [3, 4, 5, 6, 7, 8, 9]
    assert asked == [3, 3, 2]
