"""Files and overrides: what wins, what is refused, and in which words."""

import subprocess
import sys
from pathlib import Path

import pytest

import fedl2p
from fedl2p.errors import ConfigError
from fedl2p.experiment.config import load_config, to_yaml, trainer_only
from fedl2p.experiment.schema import Config

ROOT = Path(fedl2p.__file__).parents[1]
BASE = """
output_dir: somewhere
data: {class_path: fedl2p.datamodules.DigitsDataModule, init_args: {seed: "${seed}", alpha: 0.5}}
model: {class_path: fedl2p.models.SmallConvNet}
"""


@pytest.fixture
def base(tmp_path: Path) -> str:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return str(path)


def written(folder: Path, name: str, content: str) -> str:
    (folder / name).write_text(content)
    return str(folder / name)


# What wins


def test_later_files_and_overrides_win(base: str, tmp_path: Path) -> None:
    second = written(tmp_path, "second.yaml", "seed: 5\nfederation: {rounds: 7, patience: 3}\n")
    third = written(tmp_path, "third.yaml", "seed: 6\n")
    config = load_config([base, second, third])
    assert (config.seed, config.federation.rounds, config.federation.patience) == (6, 7, 3)
    config = load_config([base, second, "seed=8", "federation.rounds=9", "federation.rounds=10"])
    assert (config.seed, config.federation.rounds, config.federation.patience) == (8, 10, 3)
    assert load_config([base, "seed=8", second]).seed == 5


def test_values_are_resolved_and_typed(base: str) -> None:
    config = load_config(
        [base, "seed=7", "federation.client_fraction=1", "baselines.rates=[1, 2]", "trainer.devices=2"]
    )
    assert config.data.init_args == {"seed": 7, "alpha": 0.5}
    assert isinstance(config.federation.client_fraction, float)
    assert config.baselines.rates == [1.0, 2.0]
    assert config.trainer == {"devices": 2}


def test_the_resolver_of_the_time_can_name_a_folder(base: str) -> None:
    folder = load_config([base, "output_dir=runs/${now:%Y}"]).output_dir
    assert folder.startswith("runs/20")


def test_an_override_replaces_a_list_and_adds_to_a_dictionary(base: str) -> None:
    config = load_config([base, "baselines.rates=[0.5, 5]", "data.init_args.train_sizes=[4, 8]"])
    assert config.baselines.rates == [0.5, 5.0]
    assert config.data.init_args == {"seed": 0, "alpha": 0.5, "train_sizes": [4, 8]}


def test_the_written_yaml_is_read_as_the_same_configuration(base: str, tmp_path: Path) -> None:
    config = load_config([base, "seed=4", "trainer.precision=64-true", "meta_nets.base_lr=0.1"])
    again = load_config([written(tmp_path, "again.yaml", to_yaml(config))])
    assert again == config
    assert isinstance(again, Config)


# What is refused


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "key", "allowed"),
    [
        ("foo=1", "'foo'", "baselines, client, data"),
        ("federation.round=1", "'federation.round'", "patience, ray, rounds"),
        ("client.meta_lr.beta=1", "'client.meta_lr.beta'", "base_lr, bn_net, lr_net"),
        ("wandb.entity=x", "'wandb.entity'", "enabled, mode, name, project"),
    ],
)
def test_an_unknown_key_is_named_with_those_that_are_known(base: str, override: str, key: str, allowed: str) -> None:
    message = refusal(base, override)
    assert f"Unknown key {key}" in message
    assert allowed in message


def test_an_unknown_key_in_a_file_names_the_file(base: str, tmp_path: Path) -> None:
    wrong = written(tmp_path, "wrong.yaml", "federation: {round: 3}\n")
    message = refusal(base, wrong)
    assert "'federation.round'" in message
    assert wrong in message


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("seed=abc", "'seed'", "Integer"),
        ("seed=1.5", "'seed'", "Integer"),
        ("seed=null", "'seed'", "int"),
        ("seed=", "'seed'", "int"),
        ("federation.client_fraction=half", "'federation.client_fraction'", "Float"),
        ("federation.rounds=1.5", "'federation.rounds'", "Integer"),
        ("baselines.l2p=maybe", "'baselines.l2p'", "bool"),
        ("baselines.rates=[a, b]", "'baselines.rates[0]'", "Float"),
        ("baselines.rates=3", "'baselines.rates'", "ListConfig"),
        ("data.init_args=3", "'data.init_args'", "Dict"),
        ("trainer=5", "'trainer'", "Dict"),
        ("data.class_path=null", "'data.class_path'", "str"),
        ("output_dir=null", "'output_dir'", "str"),
    ],
)
def test_a_wrong_type_is_named_with_the_right_one(base: str, override: str, key: str, words: str) -> None:
    message = refusal(base, override)
    assert f"The key {key}" in message
    assert words in message


@pytest.mark.parametrize("override", ["federation=5", "data=foo", "client.meta_lr=0.1"])
def test_a_value_in_the_place_of_a_section_is_named(base: str, override: str) -> None:
    assert f"'{override.partition('=')[0]}'" in refusal(base, override)


def test_an_interpolation_of_nothing_is_named(base: str) -> None:
    message = refusal(base, "output_dir=runs/${nope}")
    assert "nope" in message
    assert "Unknown key 'output_dir'" not in message


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("seed=-1", "0 or more"),
        ("federation.rounds=-1", "0 or more"),
        ("federation.patience=0", "1 or more"),
        ("federation.patience=-3", "1 or more"),
        ("federation.cohort_size=0", "1 or more"),
        ("federation.client_fraction=0", "above 0 and at most 1"),
        ("federation.client_fraction=1.01", "above 0 and at most 1"),
        ("federation.client_fraction=.nan", "above 0 and at most 1"),
        ("federation.validation_fraction=-0.5", "above 0 and at most 1"),
        ("federation.min_reply_fraction=0", "above 0 and at most 1"),
        ("federation.engine=rays", "'local'"),
        ("federation.meta_lr_decay=linear", "'none' or 'cosine'"),
        ("client.finetune_epochs=-1", "client.finetune_epochs is -1; allowed is a whole number, 0 or more"),
        ("client.meta_iterations=0", "1 or more"),
        ("client.clip_value=0", "above 0"),
        ("client.running_start=warm", "measured, zero_one"),
        ("client.validation_loss=accuracy", "cross_entropy, expected_error"),
        ("client.evaluation_statistics=own", "running, batch"),
        ("client.meta_lr.bn_net=-0.1", "0 or more"),
        ("client.meta_lr.base_lr=.inf", "0 or more"),
        ("hypergradient.name=magic", "'unrolled' or 'fomaml' or 'ift'"),
        ("meta_nets.initialization=random", "'paper' or 'responsive'"),
        ("meta_nets.initial_beta=1.5", "0 to 1"),
        ("meta_nets.base_lr=.nan", "a finite number or null"),
        ("pretraining.rounds=-1", "0 or more"),
        ("pretraining.epochs=0", "1 or more"),
        ("pretraining.lr=0", "above 0"),
        ("pretraining.momentum=1", "from 0 to below 1"),
        ("pretraining.weights=no/such/file", "an existing file, or null"),
        ("baselines.rates=[0.1]", "two or more different positive rates"),
        ("baselines.rates=[0.1, 0.1]", "two or more different positive rates"),
        ("baselines.rates=[0, 0.1]", "two or more different positive rates"),
        ("baselines.rates=[]", "two or more different positive rates"),
        ("baselines.rates=[0.1, .inf]", "two or more different positive rates"),
        pytest.param(
            "baselines.rates=[0.1, .nan]",
            "two or more different positive rates",
        ),
        pytest.param(
            "pretraining.lr=.inf",
            "above 0",
        ),
        ("wandb.mode=sometimes", "'online' or 'offline' or 'disabled'"),
    ],
)
def test_an_impossible_value_is_refused_with_its_key_and_what_is_allowed(
    base: str, override: str, allowed: str
) -> None:
    message = refusal(base, override)
    assert message.startswith(override.partition("=")[0])
    assert allowed in message


def test_a_key_without_a_value_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "no_output.yaml", BASE.replace("output_dir: somewhere", ""))
    assert "'output_dir' has no value" in refusal(path)


def test_files_that_cannot_be_read_are_named(base: str, tmp_path: Path) -> None:
    assert "'nowhere.yaml' does not exist" in refusal(base, "nowhere.yaml")
    bad = written(tmp_path, "bad.yaml", "a: [1\n b: }\n")
    assert "not valid YAML" in refusal(bad)
    assert bad in refusal(bad)
    assert "not a list" in refusal(written(tmp_path, "list.yaml", "- a\n"))
    twice = written(tmp_path, "twice.yaml", "seed: 1\nseed: 2\n")
    assert twice in refusal(base, twice)
    assert str(tmp_path) in refusal(str(tmp_path))


def test_an_empty_file_changes_nothing(base: str, tmp_path: Path) -> None:
    assert load_config([base, written(tmp_path, "empty.yaml", "")]) == load_config([base])


@pytest.mark.parametrize("arguments", [[], ["seed=1"]])
def test_no_file_at_all_is_refused(arguments: list[str]) -> None:
    assert "No configuration file" in refusal(*arguments)


# What is loaded


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import fedl2p", ("torch", "flwr", "ray", "wandb", "lightning")),
        ("import fedl2p.experiment.config", ("torch", "flwr", "ray", "wandb", "lightning")),
        ("import fedl2p.cli", ("torch", "flwr", "ray", "wandb", "lightning")),
        (
            "from fedl2p.cli import main\ntry: main(['run', '--help'])\nexcept SystemExit: pass",
            ("torch", "flwr", "ray", "wandb", "lightning"),
        ),
        (
            "from fedl2p.cli import main\nassert main(['run', 'configs/digits.yaml', 'sed=1']) == 2",
            ("torch", "flwr", "ray", "wandb", "lightning"),
        ),
        ("import fedl2p.federation", ("flwr", "ray")),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str, unwanted: tuple[str, ...]) -> None:
    check = f"{code}\nimport sys\nassert not {set(unwanted)!r} & set(sys.modules), sorted(sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# Which keys of the Trainer cohorts follow themselves


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({}, []),
        ({"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed", "limit_train_batches": 2}, []),
        ({"devices": [3]}, []),
        ({"devices": "auto", "precision": 32}, []),
        ({"devices": 2}, ["devices"]),
        ({"devices": [0, 1]}, ["devices"]),
        ({"precision": "64-true"}, []),
        ({"profiler": "simple"}, ["profiler"]),
        ({"strategy": "ddp", "gradient_clip_val": 1.0}, ["strategy", "gradient_clip_val"]),
    ],
)
def test_what_only_a_trainer_follows(trainer: dict[str, object], expected: list[str]) -> None:
    assert trainer_only(trainer) == expected


def test_a_cohort_size_beside_what_needs_a_trainer_is_refused() -> None:
    base = ["configs/digits.yaml", "trainer.profiler=simple"]
    for allowed in ("auto", 1):
        load_config([*base, f"federation.cohort_size={allowed}"])
    with pytest.raises(ConfigError, match=r"federation\.cohort_size is 8; .*trainer\.profiler needs a Trainer"):
        load_config([*base, "federation.cohort_size=8"])


def test_a_precision_that_clients_cannot_follow_everywhere_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.precision is 'bf16-true'; allowed is .*'64-true'"):
        load_config(["configs/digits.yaml", "trainer.precision=bf16-true"])


@pytest.mark.parametrize("value", ["0", "-1", "all", "1.5", "true"])
def test_an_impossible_cohort_size_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"federation\.cohort_size is .*'auto', or 1 or more"):
        load_config(["configs/digits.yaml", f"federation.cohort_size={value}"])
