"""The main job from end to end: theta_g, the baselines, the rounds, L2P, and everything measured on both pools."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from flwr.serverapp import Grid
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from fedl2p.callbacks import MetricsFile, RoundProgress
from fedl2p.core.cohort import Evaluation
from fedl2p.core.finetune import EvaluationStatistics
from fedl2p.core.functional import Tensors
from fedl2p.core.meta_nets import Hyperparameters
from fedl2p.errors import ConfigError, ModelError
from fedl2p.experiment.build import (
    GLOBAL_MODEL,
    build_data,
    build_model,
    build_remote_app,
    build_runtime,
    build_training,
    check_model,
    check_trainer,
)
from fedl2p.experiment.config import Config, fingerprint, to_yaml
from fedl2p.experiment.folder import RunFolder
from fedl2p.experiment.methods import FINE_TUNING, FixedRecipe, derangement, tune_rate
from fedl2p.experiment.results import MethodResult, client_table, mean_of
from fedl2p.federation.checkpoint import load_metadata, load_state, load_tensors, save_state, write_tensors
from fedl2p.federation.client_app import make_client_app, make_cohort_handlers
from fedl2p.federation.fedavg import make_pretrain_app, pretrain
from fedl2p.federation.local import LocalGrid, flower_run
from fedl2p.federation.ray import require_ray, simulate
from fedl2p.federation.rounds import decayed, new_state, run_rounds, set_up
from fedl2p.federation.settings import RoundSettings
from fedl2p.federation.state import MetaState, RoundCallback
from fedl2p.models.weights import load_weights
from fedl2p.policy import policy_metadata
from fedl2p.seeding import derive_seed

POOLS = ("seen", "unseen")
SHUFFLES = 5  # one alone says little: a few clients can get statistics that suit them by chance

Result = TypeVar("Result")


class Experiment:
    """One run of the main job.

    Attributes:
        config: of the run.
        folder: where it goes.
        data: the federation's data.
        timings: seconds by stage.
    """

    def __init__(self, config: Config, *, resume: bool = False, console: Console | None = None) -> None:
        """Builds and checks everything that can fail for a wrong configuration; nothing is written yet.

        Args:
            config: from `load_config`.
            resume: go on with the run in `config.output_dir`.
            console: for progress; standard error if None.

        Raises:
            ConfigError: a component is wrong.
            RunFolderError: the folder cannot be used.
        """
        logging.getLogger("flwr").setLevel(logging.ERROR)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config = config
        self.console = console or Console(stderr=True)
        self.folder = RunFolder(config.output_dir)
        self.folder.require_usable(resume=resume)
        self.resume = resume
        check_trainer(config)
        if config.federation.engine == "ray":
            require_ray()
        self.data = build_data(config)
        self.model = build_model(config)
        if config.pretraining.weights is not None:
            self._load_weights(Path(config.pretraining.weights), "pretraining.weights")
        check_model(config, self.data, self.model)
        if resume:
            self.folder.require_same(to_yaml(config))
        self.timings: dict[str, float] = {}

    def run(self, callbacks: Sequence[RoundCallback] = ()) -> "Experiment":
        """Runs all stages; a stage that a resumed run has done is read from its folder."""
        self.folder.start(to_yaml(self.config), resume=self.resume)
        with flower_run():
            with self._stage("pretraining"):
                self.model = self._pretrained()
            self.runtime = build_runtime(self.config, self.data, self.model, base_lr=0.0)
            with self._stage("tuning"):
                self.rates = self._tuned_rates()
            with self._stage("rounds"):
                self.state = self._rounds(callbacks)
            with self._stage("l2p"):
                self.local_lambdas = self._learn_locally() if self.config.baselines.l2p else {}
            with self._stage("evaluation"):
                self.methods = self._measure_methods()
        return self

    # Stage 1: theta_g

    def _pretrained(self) -> nn.Module:
        path, settings = self.folder.path / GLOBAL_MODEL, self.config.pretraining
        model = self.model
        if path.exists():
            self._load_weights(path, "the run to resume")
            return model.eval()
        pool = self.data.pool(settings.pool)
        if settings.rounds and pool:
            with self._bar("Pretraining by FedAvg", settings.rounds) as advance:

                def work(grid: Grid) -> nn.Module:
                    return pretrain(
                        grid,
                        model,
                        client_ids=pool,
                        rounds=settings.rounds,
                        client_fraction=settings.client_fraction,
                        lr_drops=settings.lr_drops,
                        seed=self.config.seed,
                        on_round=lambda number: advance(),
                    )

                training = build_training(self.config, self.data, model)
                model = self._on_grid(work, lambda: LocalGrid(make_pretrain_app(training), pool))
        write_tensors(path, model.state_dict(), {})
        return model.eval()

    def _load_weights(self, path: Path, key: str) -> None:
        try:
            load_weights(self.model, path)
        except ModelError as error:
            raise ConfigError(f"{key}: {error}") from error

    # Stage 2: the rates of the hand-made recipes

    def _tuned_rates(self) -> dict[str, dict[str, Any]]:
        stored = self.folder.read_json("checkpoints/tuning.json")
        if stored is not None:
            return dict(stored)
        result: dict[str, dict[str, Any]] = {}
        seen = self.data.pool("seen")
        rates = self.config.baselines.rates
        with self._bar("Tuning the baselines", len(FINE_TUNING) * len(rates)) as advance:
            for name, method in FINE_TUNING.items():

                def loss_of(
                    rate: float, beta: float = method.beta, statistics: EvaluationStatistics = method.statistics
                ) -> float:
                    recipe = FixedRecipe.fitting(self.runtime.model, beta=beta, rate=rate)
                    recipes = [recipe(self.runtime.statistics(client_id)) for client_id in seen]
                    measured = self.runtime.evaluate(recipes, seen, statistics=statistics)
                    advance()
                    return self._weighted_loss(measured, seen)

                best, losses = tune_rate(loss_of, rates)
                result[name] = {"rate": best, "val_loss": losses[best], "grid": [[r, losses[r]] for r in losses]}
        self.folder.write_json("checkpoints/tuning.json", result)
        return result

    def _weighted_loss(self, measured: Sequence[dict[str, Evaluation]], client_ids: Sequence[int]) -> float:
        """The mean validation loss of clients, weighted by their training samples, as the rounds weight it."""
        weights = [self.runtime.statistics(client_id).num_samples for client_id in client_ids]
        return sum(w * m["val"].val_loss for w, m in zip(weights, measured, strict=True)) / sum(weights)

    def base_lr(self) -> float:
        """The initial eta~: as configured, or the rate of the hand-made recipe with the lowest validation loss."""
        configured = self.config.meta_nets.base_lr
        if configured is not None:
            return configured
        best = min(self.rates.values(), key=lambda chosen: chosen["val_loss"])
        return float(best["rate"])

    # Stage 3: Algorithm 1

    def _rounds(self, callbacks: Sequence[RoundCallback]) -> MetaState:
        config, seen = self.config.federation, self.data.pool("seen")
        settings = RoundSettings(
            rounds=config.rounds,
            patience=config.patience,
            client_fraction=config.client_fraction,
            validation_fraction=config.validation_fraction,
            min_reply_fraction=config.min_reply_fraction,
            meta_lr_decay=config.meta_lr_decay,  # type: ignore[arg-type]  # checked by config.check
            aggregation=config.aggregation,  # type: ignore[arg-type]  # likewise
            max_update_norm=config.max_update_norm,
            max_client_weight=config.max_client_weight,
            max_loss_ratio=config.max_loss_ratio,
            seed=self.config.seed,
        )
        run = fingerprint(self.config)
        stored = load_state(self.folder.checkpoints, run=run, template=self.runtime.lambda_())

        def work(grid: Grid) -> MetaState:
            federation = set_up(
                grid,
                self.runtime.meta_nets,
                {client_id: self.data.clients[client_id].name for client_id in seen},
                settings,
                base_lr=self.base_lr(),
                standardize=self.config.meta_nets.standardize,
            )
            return run_rounds(
                grid,
                federation,
                stored or new_state(federation),
                callbacks=[
                    RoundProgress(console=self.console),
                    MetricsFile(path=self.folder.path / "metrics.jsonl"),
                    *callbacks,
                ],
                save=lambda current: save_state(self.folder.checkpoints, current, run=run),
            )

        together = None if self.runtime.through_trainer else make_cohort_handlers(self.runtime)
        app = make_client_app(self.runtime)
        state = self._on_grid(work, lambda: LocalGrid(app, seen, cohort_handlers=together))
        self._save_policy(state.best_lambda)
        return state

    def _save_policy(self, lambda_: Tensors) -> None:
        nets = self.runtime.meta_nets
        tensors = dict(nets.named_buffers()) | lambda_
        write_tensors(self.folder.path / "meta_nets.safetensors", tensors, policy_metadata(nets))

    # Stage 4: L2P

    def l2p_calls(self) -> int:
        """How many times each client runs K iterations alone: as often as FedL2P asks a client on average."""
        asked = sum(len(record.clients) for record in self.state.history)
        return max(1, round(asked / len(self.data.pool("seen"))))

    def _learn_locally(self) -> dict[int, Tensors]:
        """Every seen client learns a lambda of its own (L2P), with FedL2P's mean number of iterations."""
        seen, calls, start = self.data.pool("seen"), self.l2p_calls(), self.runtime.lambda_()
        path = self.folder.checkpoints / "l2p.safetensors"
        done, lambdas = _load_lambdas(path, seen) or (0, dict.fromkeys(seen, start))
        saved = time.monotonic()
        with self._bar("L2P, each client alone", calls, done) as advance:
            for number in range(done + 1, calls + 1):
                scale = self._local_scale(number, calls)
                updates = self.runtime.meta_update(
                    [lambdas[i] for i in seen], seen, number, phase="l2p", meta_lr_scale=scale
                )
                lambdas = {i: update.lambda_ for i, update in zip(seen, updates, strict=True)}
                advance()
                if number == calls or time.monotonic() - saved > 30:
                    flat = {f"{i}/{name}": t for i, own in lambdas.items() for name, t in own.items()}
                    write_tensors(path, flat, {"done": str(number)})
                    saved = time.monotonic()
        return lambdas

    def _local_scale(self, number: int, calls: int) -> float:
        """The decay of the meta learning rates over a client's own iterations, as over the rounds."""
        decay = self.config.federation.meta_lr_decay
        return decayed(decay, number, calls)

    # Stage 5: everything measured

    def _measure_methods(self) -> dict[str, MethodResult]:
        """The global model, the baselines, L2P, FedL2P and the ablation, each on the pools that it is for."""
        best, methods = self.state.best_lambda, {}
        total = 2 + len(FINE_TUNING) + bool(self.local_lambdas) + SHUFFLES * self.config.baselines.shuffled
        with self._bar("Testing all methods", total) as advance:

            def measure(
                label: str,
                recipe: Callable[[int], Hyperparameters],
                *,
                pools: Sequence[str] = POOLS,
                **options: Any,
            ) -> MethodResult:
                result = MethodResult(label, options.pop("settings", {}), {})
                for pool in pools:
                    ids = self.data.pool(pool)
                    if ids:
                        recipes = [recipe(client_id) for client_id in ids]
                        measured = self.runtime.evaluate(recipes, ids, parts=("test",), **options)
                        result.pools[pool] = client_table(self.data, ids, measured)
                advance()
                return result

            nothing = self._fixed(0.0, 0.0)
            methods["global"] = measure("Global model", nothing, finetune=False, statistics="running")
            for name, method in FINE_TUNING.items():
                chosen = self.rates[name]
                methods[name] = measure(
                    method.label,
                    self._fixed(method.beta, chosen["rate"]),
                    statistics=method.statistics,
                    settings=chosen,
                )
            if self.local_lambdas:
                methods["l2p"] = measure(
                    "L2P",
                    lambda i: self.runtime.recipe(self.local_lambdas[i], i),
                    pools=("seen",),
                    settings={"meta_iterations": self.l2p_calls() * self.config.client.meta_iterations},
                )
            settings = {"base_lr": self.base_lr(), "best_round": self.state.best_round}
            methods["fedl2p"] = measure("FedL2P", lambda i: self.runtime.recipe(best, i), settings=settings)
            if self.config.baselines.shuffled:
                label, shuffled = "FedL2P, statistics shuffled", []
                for number in range(SHUFFLES):
                    others = self._other_clients(number)
                    recipes = {i: self.runtime.recipe(best, other) for i, other in others.items()}
                    shuffled.append(measure(label, recipes.__getitem__))
                methods["fedl2p_shuffled"] = mean_of(shuffled, settings={"shuffles": SHUFFLES})
        return methods

    def _fixed(self, beta: float, rate: float) -> Callable[[int], Hyperparameters]:
        recipe = FixedRecipe.fitting(self.runtime.model, beta=beta, rate=rate)
        return lambda client_id: recipe(self.runtime.statistics(client_id))

    def _other_clients(self, number: int) -> dict[int, int]:
        """For each client another one of its pool, whose statistics the nets then read in shuffle `number`."""
        others: dict[int, int] = {}
        for pool in POOLS:
            ids = self.data.pool(pool)
            if len(ids) > 1:
                order = derangement(len(ids), derive_seed(self.config.seed, "shuffle", pool, number))
                others |= {client_id: ids[order[position]] for position, client_id in enumerate(ids)}
            else:
                others |= {client_id: client_id for client_id in ids}
        return others

    # What the stages share

    def _on_grid(self, work: Callable[[Grid], Result], local: Callable[[], LocalGrid]) -> Result:
        """Does the server's work on the engine that is configured."""
        settings = self.config.federation
        if settings.engine == "local":
            return work(local())
        return simulate(
            build_remote_app(self.config, self.folder.path),
            work,
            num_clients=len(self.data.clients),
            num_cpus=settings.ray.num_cpus,
            num_gpus=settings.ray.num_gpus,
        )

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.timings[name] = time.monotonic() - started

    @contextlib.contextmanager
    def _bar(self, description: str, total: int, done: int = 0) -> Iterator[Callable[[], None]]:
        """A progress bar; where there is no terminal, one line when the stage begins."""
        if not self.console.is_terminal:
            self.console.print(f"{description} ...")
            yield lambda: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(description, total=total, completed=done)
            yield lambda: progress.advance(task)


def _load_lambdas(path: Path, client_ids: Sequence[int]) -> tuple[int, dict[int, Tensors]] | None:
    """The number of calls that are done, and every client's lambda after them."""
    if not path.exists():
        return None
    tensors = load_tensors(path)
    metadata = load_metadata(path)
    own: dict[int, Tensors] = {client_id: {} for client_id in client_ids}
    for key, tensor in tensors.items():
        client_id, _, name = key.partition("/")
        own[int(client_id)][name] = tensor
    return int(metadata["done"]), own
