"""Every setting of a learner: its default, its bounds, and the plain forms that it is given in."""

import subprocess
import sys
from typing import Any

import pytest

from fedl2p.core.settings import BatchNormMode, LearnerSettings, MetaLearningRates, RunningStart, word
from fedl2p.errors import ConfigError

RATES = {"bn_net": 0.01, "lr_net": 0.02, "base_lr": 0.03}


def test_defaults_are_those_of_the_paper_with_the_measured_start() -> None:
    assert LearnerSettings().as_dict() == {
        "finetune_epochs": 15,
        "meta_iterations": 3,
        "meta_lr": {"bn_net": 1e-3, "lr_net": 1e-3, "base_lr": 1e-4},
        "clip_value": 1.0,
        "running_start": "measured",
        "evaluation_statistics": "running",
    }


def test_values_at_the_bounds_are_taken() -> None:
    lowest = LearnerSettings(finetune_epochs=0, meta_iterations=1, clip_value=1e-30)
    assert (lowest.finetune_epochs, lowest.meta_iterations, lowest.clip_value) == (0, 1, 1e-30)
    assert vars(MetaLearningRates(0, 0.0, 0)) == {"bn_net": 0, "lr_net": 0.0, "base_lr": 0}


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("finetune_epochs", -1, "a whole number, 0 or more"),
        ("finetune_epochs", 1.5, "a whole number, 0 or more"),
        ("finetune_epochs", True, "a whole number, 0 or more"),
        ("finetune_epochs", None, "a whole number, 0 or more"),
        ("meta_iterations", 0, "a whole number, 1 or more"),
        ("meta_iterations", 2.0, "a whole number, 1 or more"),
        ("meta_iterations", True, "a whole number, 1 or more"),
        ("meta_iterations", "3", "a whole number, 1 or more"),
        ("clip_value", 0.0, "above 0"),
        ("clip_value", -1.0, "above 0"),
        ("clip_value", float("nan"), "above 0"),
        ("clip_value", float("inf"), "above 0"),
        ("clip_value", "1", "above 0"),
        ("clip_value", None, "above 0"),
        ("running_start", "pretrained", "'measured' and 'zero_one'"),
        ("running_start", None, "'measured' and 'zero_one'"),
        ("evaluation_statistics", "own", "'running' and 'batch'"),
        ("evaluation_statistics", 1, "'running' and 'batch'"),
    ],
)
def test_what_is_impossible_is_refused_by_name_with_what_is_allowed(name: str, value: Any, allowed: str) -> None:
    for make in (LearnerSettings, LearnerSettings.of):
        with pytest.raises(ConfigError, match=rf"^{name} is .*{value}.*; allowed (is|are) {allowed}\.$"):
            make(**{name: value})


@pytest.mark.parametrize(
    "rates", [{"bn_net": 0.1, "lr_net": 0.1}, {**RATES, "other": 0.1}, {}, 0.1, None], ids=lambda rates: str(rates)
)
def test_rates_that_are_missing_or_unknown_are_errors(rates: Any) -> None:
    with pytest.raises(ConfigError, match=r"^meta_lr is .* at least 0 for each of bn_net, lr_net, base_lr\.$"):
        LearnerSettings(meta_lr=rates)


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf"), "0.1", None, True])
def test_rates_that_are_negative_or_no_finite_numbers_are_errors(name: str, rate: Any) -> None:
    for make in (lambda rates: LearnerSettings(meta_lr=rates), lambda rates: MetaLearningRates(**rates)):
        with pytest.raises(ConfigError, match=rf"^meta_lr\.{name} is .*{rate}.*; allowed is 0 or more\.$"):
            make({**RATES, name: rate})


def test_plain_words_and_mappings_become_members_and_rates() -> None:
    plain = LearnerSettings(meta_lr=RATES, running_start="zero_one", evaluation_statistics="batch")
    assert plain.running_start is RunningStart.zero_one
    assert plain.evaluation_statistics is BatchNormMode.batch
    assert plain.meta_lr == MetaLearningRates(**RATES)
    members = LearnerSettings(
        meta_lr=MetaLearningRates(**RATES),
        running_start=RunningStart.zero_one,
        evaluation_statistics=BatchNormMode.batch,
    )
    assert plain == members


def test_settings_go_through_plain_values_and_back() -> None:
    settings = LearnerSettings(
        finetune_epochs=2,
        meta_iterations=5,
        meta_lr=MetaLearningRates(**RATES),
        clip_value=0.5,
        running_start=RunningStart.zero_one,
        evaluation_statistics=BatchNormMode.batch,
    )
    values = settings.as_dict()
    assert values["meta_lr"] == RATES
    assert [type(values[name]) for name in ("meta_lr", "running_start", "evaluation_statistics")] == [dict, str, str]
    assert LearnerSettings.of(**values) == settings


def test_an_unknown_name_is_an_error_that_names_the_known_ones() -> None:
    known = "finetune_epochs, meta_iterations, meta_lr, clip_value, running_start, evaluation_statistics"
    with pytest.raises(ConfigError, match=rf"^'epochs' is no setting of a client; known are {known}\.$"):
        LearnerSettings.of(epochs=3, finetune_epochs=2)


def test_scaled_rates_are_all_three_multiplied() -> None:
    assert MetaLearningRates(1.0, 2.0, 4.0).scaled(0.5) == MetaLearningRates(0.5, 1.0, 2.0)
    assert MetaLearningRates().scaled(0) == MetaLearningRates(0, 0, 0)


def test_settings_cannot_be_changed() -> None:
    settings = LearnerSettings()
    with pytest.raises(AttributeError):
        settings.clip_value = 2.0  # type: ignore[misc]  # what is tested
    with pytest.raises(AttributeError):
        settings.meta_lr.bn_net = 2.0  # type: ignore[misc]  # what is tested


def test_a_word_is_a_member_of_its_list_by_itself_or_by_name() -> None:
    assert word(BatchNormMode, "batch", "mode") is word(BatchNormMode, BatchNormMode.batch, "mode")
    with pytest.raises(ConfigError, match=r"^mode is 'none'; allowed are 'running' and 'batch'\.$"):
        word(BatchNormMode, "none", "mode")


def test_reading_settings_does_not_wait_for_torch() -> None:
    code = "import sys, fedl2p.core.settings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
