"""Engine `ray`: Flower's simulation, which spreads clients over processes and GPUs; the same strategy and ClientApp."""

import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run

from fedl2p.errors import ConfigError, FederationError

Result = TypeVar("Result")

_POLL_SECONDS = 0.1


def require_ray() -> None:
    """Refuses engine `ray` where Ray is not installed.

    Raises:
        ConfigError: it is not.
    """
    try:
        import ray  # noqa: F401 (only whether it is there)
    except ImportError:
        raise ConfigError(
            "federation.engine is 'ray', but Ray is not installed; install it by pip install 'fedl2p[ray]', or choose "
            "the engine 'local'."
        ) from None


def simulate(
    app: ClientApp,
    work: Callable[[Grid], Result],
    *,
    num_clients: int,
    num_cpus: float = 1,
    num_gpus: float = 0.0,
) -> Result:
    """Runs `work` on a grid whose nodes are Flower's simulated clients, 0 to `num_clients` - 1.

    Args:
        app: answers for every client, in processes of Ray's; it is pickled.
        work: the server's side; runs in a thread of this process.
        num_clients: nodes.
        num_cpus: of the machine, for one client at a time; at least as many clients run at once as this allows.
        num_gpus: likewise; a fraction such as 0.25 lets four clients share a GPU.

    Returns:
        What `work` returns.

    Raises:
        FederationError: the simulation ended before `work` did.
    """
    from flwr.simulation import run_simulation

    results: list[Result] = []
    stopped = threading.Event()
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        results.append(work(_SimulatedGrid(grid, num_clients, stopped)))

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's own coming default; it warns otherwise
    config: Any = {
        "client_resources": {"num_cpus": num_cpus, "num_gpus": num_gpus},
        "init_args": {"include_dashboard": False, "logging_level": logging.ERROR, "log_to_driver": False},
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Flower wants simulations to be started by its own command line
            run_simulation(server, app, num_clients, backend_config=config)
    finally:
        stopped.set()
    if not results:
        raise FederationError("Flower's simulation ended before the rounds did; its log says why.")
    return results[0]


class _SimulatedGrid(Grid):
    """Flower's grid, but all nodes are waited for at the start, and no reply is once the simulation has ended."""

    def __init__(self, grid: Grid, num_nodes: int, stopped: threading.Event) -> None:
        self._grid = grid
        self._num_nodes = num_nodes
        self._stopped = stopped

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        while len(ids := list(self._grid.get_node_ids())) < self._num_nodes:
            self._wait()
        return ids

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies as they come; a timeout has no meaning here, since Ray answers for clients that end."""
        waiting = set(self.push_messages(messages))
        while waiting:
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply
            if waiting:
                self._wait()

    def _wait(self) -> None:
        if self._stopped.wait(_POLL_SECONDS):
            raise FederationError("The simulation has ended.")
