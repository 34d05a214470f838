"""The command line. Everything heavy is imported after the arguments and the configuration are known to be right."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from fedl2p import __version__
from fedl2p.errors import ConfigError, FedL2PError, RunFolderError
from fedl2p.signals import INTERRUPTED, stop_signals

if TYPE_CHECKING:
    from fedl2p.experiment.schema import Config

RUN_HELP = """\
Runs the whole main job: theta_g by FedAvg on the pretrain pool, the fine-tuning baselines with tuned learning rates,
the rounds of FedL2P, L2P, and the test of every method on seen and unseen clients.

The configuration is read from left to right, and later ones win:

  fedl2p run digits                         a configuration that comes with fedl2p; `fedl2p configs` lists them
  fedl2p run configs/digits.yaml            or a file
  fedl2p run configs/digits.yaml seed=7 output_dir=runs/seven federation.rounds=20
  fedl2p run configs/digits.yaml mine.yaml data.class_path=my_package.MyData 'data.init_args={path: /data}'
  fedl2p run configs/digits.yaml output_dir=runs/seven seed=7 --resume
  fedl2p run configs/digits.yaml --dry-run

An interrupted run goes on with --resume; a finished one does if federation.rounds has grown, and nothing else.
"""

DATA_HELP = """\
Divides the data of a configuration among its clients, as a run would, and shows the result: clients and their sizes,
labels, domains and pools, and all of it in one picture. Nothing is trained.

  fedl2p data configs/digits.yaml
  fedl2p data configs/cifar10.yaml seed=7 data.init_args.alpha=0.5 --picture alpha.png
"""


REPORT_HELP = """\
Writes report.html, one page that needs nothing else, into the folder of the first run, and its figures as SVG and PDF
beside. `fedl2p run` does so at its end. Several runs stand side by side, with mean and SD over seeds; an interrupted
run is shown as far as it came.

  fedl2p report runs/seven
  fedl2p report runs/seed0 runs/seed1 runs/seed2
"""

INSPECT_HELP = """\
Prints beta and eta of chosen clients, layer by layer.

  fedl2p inspect runs/seven --client seen-blur-03 --client seen-noise-00
  fedl2p inspect runs/seven --pool unseen --kind beta
  fedl2p inspect runs/seven --domain blur --format csv > blur.csv
"""

PERSONALIZE_HELP = """\
Makes a finished run's model a new client's own: one pass over its data for its recipe, fine-tuning, and a plain model
in personalized.safetensors that load_state_dict takes; hyperparameters.csv and report.json lie beside it.

  fedl2p personalize runs/seven --data digits --client 17 --out personalized
  fedl2p personalize runs/photos --data my_photos --out personalized

The data are a configuration of which a client is picked (of it only the data count), or, where the run's data are
image files too, a folder of one client's images: my_photos/CLASS/FILE, or my_photos/train/CLASS/FILE with val and test
beside.
"""

KEYS_HELP = """\
Prints the keys of a configuration with their types, defaults and meanings.

  fedl2p keys
  fedl2p keys federation
"""


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="fedl2p",
        description="Federated learning to personalize: clients learn together how each should fine-tune.",
    )
    parser.add_argument("--version", action="version", version=f"fedl2p {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(name: str, *, help: str, description: str) -> argparse.ArgumentParser:
        plain = argparse.RawDescriptionHelpFormatter
        command: argparse.ArgumentParser = commands.add_parser(
            name, help=help, description=description, formatter_class=plain
        )
        return command

    def add_config(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "config",
            nargs="+",
            metavar="CONFIG|key=value",
            help="YAML files, names of configurations that come with fedl2p, and overrides; later ones win",
        )

    run = add_command("run", help="run an experiment from a configuration file", description=RUN_HELP)
    add_config(run)
    run.add_argument("--resume", action="store_true", help="go on with the run in output_dir, or give it more rounds")
    run.add_argument("--dry-run", action="store_true", help="estimate steps, time and memory; nothing is written")
    data = add_command("data", help="show how a configuration divides its data among clients", description=DATA_HELP)
    add_config(data)
    data.add_argument("--all", action="store_true", help="list every client, not only the first of each pool")
    data.add_argument("--picture", metavar="FILE", help="where the PNG goes; beside the run's folder by default")
    names = "list the configurations that come with fedl2p"
    add_command("configs", help=names, description=f"{names[0].upper()}{names[1:]}: what each runs, and how long.")
    keys = add_command("keys", help="list the keys of a configuration", description=KEYS_HELP)
    keys.add_argument("prefix", nargs="?", default="", metavar="PREFIX", help="only keys that begin with it")
    _add_reading_commands(commands)
    _add_personalize(commands)
    return parser


def _add_reading_commands(commands: Any) -> None:
    """The commands that read the folders of runs and need no configuration."""
    plain = argparse.RawDescriptionHelpFormatter
    report = commands.add_parser(
        "report", help="write the page of one run or several", description=REPORT_HELP, formatter_class=plain
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs; the page goes into the first")
    inspect = commands.add_parser(
        "inspect", help="print what clients' hyperparameters became", description=INSPECT_HELP, formatter_class=plain
    )
    inspect.add_argument("run", metavar="RUN", help="the folder of a run")
    inspect.add_argument("--client", action="append", default=[], metavar="NAME", help="this client; may be repeated")
    inspect.add_argument("--pool", help="clients of this pool")
    inspect.add_argument("--domain", help="clients of this domain")
    inspect.add_argument("--kind", choices=("beta", "eta"), help="one of the two; both by default")
    inspect.add_argument("--format", choices=("table", "csv", "json"), default="table", help="table by default")


def _add_personalize(commands: Any) -> None:
    """The command for a new client."""
    personalize = commands.add_parser(
        "personalize",
        help="make a run's model a new client's own",
        description=PERSONALIZE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    personalize.add_argument("run", metavar="RUN", help="the folder of a run")
    personalize.add_argument(
        "--data", required=True, metavar="CONFIG|FOLDER", help="a configuration, or images by class"
    )
    personalize.add_argument("--client", metavar="NAME", help="a client of the configuration, by name or index")
    personalize.add_argument("--out", required=True, metavar="FOLDER", help="is made; must not hold files")
    personalize.add_argument("--refine", action="store_true", help="better the learning rates on validation data first")
    personalize.add_argument("--mean-recipe", action="store_true", help="take the seen clients' mean recipe")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: of the command line, without the program's name; None takes them from the process.

    Returns:
        0, 1 after an error while running, 2 after an error in what was asked, 130 after an interruption (by Ctrl-C or
        SIGTERM).
    """
    folder: str | None = None  # of the run
    with stop_signals() as signals:
        try:
            options = make_parser().parse_args(arguments)
            if os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())  # `data.class_path=mine.MyData` finds mine.py here, as with `python -m`
            from fedl2p.experiment.config import load_config

            if options.command == "configs":
                return configs()
            if options.command == "keys":
                return keys(options.prefix)
            if options.command == "report":
                return report(options.runs)
            if options.command == "inspect":
                return inspect(options)
            if options.command == "personalize":
                return personalize(options)
            config = load_config(options.config)
            if options.command == "data":
                return data(config, picture=options.picture, all_clients=options.all)
            if options.dry_run:
                return dry_run(config, resume=options.resume)
            folder = config.output_dir
            return run(config, resume=options.resume)
        except BaseException as error:
            if signals.received or isinstance(error, KeyboardInterrupt):
                return _interrupted(folder)  # whatever has become of the interruption on its way here
            if isinstance(error, ConfigError | RunFolderError):
                return _complain(error, 2)
            if isinstance(error, FedL2PError):
                return _complain(error, 1)
            if isinstance(error, BrokenPipeError):  # whoever read our output, as `| head` does, has enough of it
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 0
            raise


def run(config: "Config", *, resume: bool = False) -> int:
    """`fedl2p run`."""
    print("Loading ...", file=sys.stderr)
    from fedl2p.experiment.run import run as run_experiment

    run_experiment(config, resume=resume)
    return 0


def dry_run(config: "Config", *, resume: bool = False) -> int:
    """`fedl2p run --dry-run`."""
    print("Loading ...", file=sys.stderr)
    from fedl2p.experiment.dry_run import dry_run as estimate

    estimate(config, resume=resume)
    return 0


def data(config: "Config", *, picture: str | None = None, all_clients: bool = False) -> int:
    """`fedl2p data`."""
    print("Loading ...", file=sys.stderr)
    from fedl2p.experiment.inspect_data import inspect_data

    inspect_data(config, picture=picture, all_clients=all_clients)
    return 0


def report(runs: Sequence[str]) -> int:
    """`fedl2p report`."""
    from fedl2p.report.page import write_report

    print(write_report(runs))
    return 0


def inspect(options: argparse.Namespace) -> int:
    """`fedl2p inspect`."""
    from fedl2p.report.inspect import show_hyperparameters

    text = show_hyperparameters(
        options.run,
        clients=options.client,
        pool=options.pool,
        domain=options.domain,
        kind=options.kind,
        form=options.format,
    )
    sys.stdout.write(text)
    return 0


def personalize(options: argparse.Namespace) -> int:
    """`fedl2p personalize`."""
    print("Loading ...", file=sys.stderr)
    from fedl2p.experiment.personalize import NewClient, summary
    from fedl2p.experiment.personalize import personalize as make_own

    asked = NewClient(
        run=Path(options.run),
        data=options.data,
        client=options.client,
        out=Path(options.out),
        refine=options.refine,
        mean_recipe=options.mean_recipe,
    )
    print(summary(make_own(asked)))
    print(asked.out)
    return 0


def configs() -> int:
    """`fedl2p configs`."""
    from fedl2p.experiment.shipped_configs import shipped_configs

    for config in shipped_configs():
        print(f"{config.name}\n{_indented(config.what)}\n{_indented(f'Time: {config.time}')}\n")
    return 0


def keys(prefix: str) -> int:
    """`fedl2p keys`."""
    from fedl2p.experiment.keys import configuration_keys

    for key in configuration_keys(prefix):
        default = "no default" if key.default is None else f"default {key.default}"
        print(f"{key.name} ({key.type}; {default})\n{_indented(key.meaning)}")
    return 0


def _indented(text: str) -> str:
    return fill(text, width=100, initial_indent="    ", subsequent_indent="    ")


def _complain(error: Exception, code: int) -> int:
    print(f"fedl2p: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _interrupted(folder: str | None) -> int:
    text = "Interrupted."
    if folder is not None and (Path(folder) / "config.yaml").is_file():
        text = f"Interrupted; the same command with output_dir={folder} and --resume goes on with the run in {folder}."
    elif folder is not None:
        text = f"Interrupted; nothing was written to {folder}."
    print(f"\nfedl2p: {text}", file=sys.stderr)
    return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
