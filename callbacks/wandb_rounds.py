"""Weights & Biases: the rounds, the clients' hyperparameters and the results of one federated run in one wandb run.

wandb is imported inside the functions that need it, so that a run without it does not pay for it.
"""

import functools
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, cast

from fedl2p.federation.state import MetaState, RoundCallback, RoundRecord
from fedl2p.report.hyperparameters import COLUMNS

P = ParamSpec("P")

Mode = Literal["online", "offline", "disabled"]

# The folders of wandb that are outside of `dir`. That of its settings is left alone: the login is kept there.
_FOLDERS = {"WANDB_CACHE_DIR": "cache", "WANDB_DATA_DIR": "data", "WANDB_ARTIFACT_DIR": "artifacts"}
_set_here: dict[str, str] = {}


def _harmless(method: Callable[Concatenate["WandbRounds", P], None]) -> Callable[Concatenate["WandbRounds", P], None]:
    """Makes an error of wandb's one warning, after which nothing more is sent."""

    @functools.wraps(method)
    def guarded(self: "WandbRounds", *args: P.args, **kwargs: P.kwargs) -> None:
        if self.broken:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # of a library that talks to a server
            self.broken = True
            self.warn(f"W&B failed ({type(error).__name__}: {error}); the run goes on without it.")

    return guarded


class WandbRounds(RoundCallback):
    """Logs each round to a wandb run, at the round's number as the step.

    A resumed federation that logs to a new wandb run sends the earlier rounds first, so that the curve is whole. An
    error of wandb's stops no federation: it is said once, and nothing more is sent.
    """

    def __init__(self, *, run: Any, warn: Callable[[str], None] = warnings.warn) -> None:
        """Sets the run.

        Args:
            run: what `wandb.init` or `start_wandb` returned; who made it finishes it.
            warn: is given the one line about an error.
        """
        self.run = run
        self.warn = warn
        self.broken = False

    @_harmless
    def on_rounds_start(self, state: MetaState, rounds: int) -> None:
        """Sends the rounds from before a resume, unless the run has them."""
        if self.run.step > 0:
            return
        best_loss, best_round = math.inf, 0
        for record in state.history:
            if record.val_loss < best_loss:
                best_loss, best_round = record.val_loss, record.round
            self._log(record, best_loss, best_round)

    @_harmless
    def on_round_end(self, state: MetaState, record: RoundRecord) -> None:
        """Sends the round's record."""
        self._log(record, state.best_loss, state.best_round)

    @_harmless
    def log_hyperparameters(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sends every client's beta and eta as one table named `hyperparameters`.

        Args:
            rows: of `fedl2p.report.hyperparameters.hyperparameter_rows`.
        """
        import wandb

        data = [[row[column] for column in COLUMNS] for row in rows]
        self.run.log({"hyperparameters": wandb.Table(columns=list(COLUMNS), data=data)})

    @_harmless
    def log_results(self, results: Mapping[str, Any]) -> None:
        """Writes the mean accuracies into the run's summary, as `<method>/<pool>/accuracy` (0 to 1).

        Args:
            results: as in `results.json`; what is missing or not finite is left out.
        """
        for method, entry in (results.get("methods") or {}).items():
            for pool, measured in entry.items():
                accuracy = measured.get("accuracy") if isinstance(measured, Mapping) else None
                mean = accuracy.get("mean") if isinstance(accuracy, Mapping) else None
                if mean is not None and math.isfinite(mean):
                    self.run.summary[f"{method}/{pool}/accuracy"] = mean

    @_harmless
    def finish(self) -> None:
        """Ends the wandb run."""
        self.run.finish()

    def _log(self, record: RoundRecord, best_loss: float, best_round: int) -> None:
        values: dict[str, float] = {
            "val_loss": record.val_loss,
            "best_val_loss": best_loss,
            "best_round": best_round,
            "clients": len(record.clients),
            "failures": len(record.failures),
            "skipped_steps": record.skipped_steps,
            "seconds": record.seconds,
        }
        if record.meta_loss is not None:
            values["meta_loss"] = record.meta_loss
        self.run.log(values, step=record.round)


def start_wandb(
    *,
    project: str,
    name: str,
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    mode: str | None = None,
    run_id: str | None = None,
) -> Any:
    """Starts a quiet wandb run of its own, beside any other that this process may have.

    Everything that wandb writes goes under `directory`; where the user has set wandb's own folder variables, those
    hold. Offline, no connection is tried: `wandb sync <directory>/wandb/offline-run-*` sends the run later.

    Args:
        project: the project's name.
        name: the run's name.
        directory: gets a folder `wandb`.
        config: the run's configuration, plain values.
        mode: None asks `WANDB_MODE`, and else is "online" where the user is logged in (an API key in the environment,
            in wandb's settings or in the netrc file) and "offline" where not.
        run_id: of an earlier run that goes on; None begins a new one.

    Returns:
        The `wandb.Run`; call its `finish()`.
    """
    import wandb

    folder = Path(directory).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    _keep_inside(folder / "wandb")
    chosen = cast(Mode, mode) if mode is not None else _mode()
    return wandb.init(
        id=run_id,
        resume="allow" if run_id is not None and chosen == "online" else None,  # offline, W&B would only warn
        project=project,
        name=name,
        dir=folder,
        config=dict(config),
        mode=chosen,
        reinit="create_new",
        # Standard output belongs to the commands; machine statistics are of no use to the study.
        settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
    )


def _mode() -> Mode:
    wanted = os.environ.get("WANDB_MODE", "")
    if wanted in ("online", "offline", "disabled"):
        return cast(Mode, wanted)
    return "online" if _logged_in() else "offline"


def _logged_in() -> bool:
    """Whether wandb has credentials, read from where it reads them.

    Not by `wandb.login(prompt=False)`: where there is a key, that one prints and asks the server who the user is, even
    with `verify=False`, and so hangs for seconds on a machine without a network.
    """
    import wandb
    from wandb.sdk.lib import wbauth

    settings = wandb.setup().settings
    if settings.api_key or settings.identity_token_file:
        return True
    return wbauth.read_netrc_auth(host=settings.base_url) is not None


def _keep_inside(folder: Path) -> None:
    """Points wandb's cache and staging folders into `folder`, unless the user has placed them."""
    for variable, name in _FOLDERS.items():
        if os.environ.get(variable) in (None, _set_here.get(variable)):
            os.environ[variable] = _set_here[variable] = str(folder / name)
