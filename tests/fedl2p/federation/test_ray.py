"""Engine `ray` against engine `local`; both run the same strategy and ClientApp."""

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch

from fedl2p.core.statistics import ClientStatistics
from fedl2p.errors import ConfigError
from fedl2p.experiment.config import load_config, to_yaml
from fedl2p.experiment.context import prepare
from fedl2p.experiment.run import Outcome, run_stages
from fedl2p.federation.checkpoint import load_statistics, save_statistics
from fedl2p.federation.ray import require_ray

SMALL = (
    "seed=101",
    "wandb.enabled=false",
    "baselines.l2p=false",
    "baselines.rates=[0.1,0.2]",
    "pretraining.rounds=2",
    "client.meta_lr={bn_net: 0.01, lr_net: 0.01, base_lr: 0.001}",
    "federation.rounds=2",
    "federation.client_fraction=0.25",
    "federation.validation_fraction=0.5",
    "data.init_args.pretrain_clients=3",
    "data.init_args.seen_clients=12",
    "data.init_args.unseen_clients=6",
)


def run(folder: Path, *overrides: str) -> Outcome:
    context = prepare(load_config(["configs/digits.yaml", f"output_dir={folder}", *SMALL, *overrides]))
    with context.folder.opened(to_yaml(context.config), resume=False):
        return run_stages(context)


@pytest.mark.slow
def test_ray_and_local_give_one_global_model_and_one_lambda(tmp_path: Path) -> None:
    local = run(tmp_path / "local")
    ray = run(tmp_path / "ray", "federation.engine=ray")
    for name, tensor in local.model.state_dict().items():
        torch.testing.assert_close(ray.model.state_dict()[name], tensor, rtol=0, atol=0)
    assert [r.clients for r in ray.state.history] == [r.clients for r in local.state.history]
    assert not any(r.failures for r in ray.state.history)
    losses = [[r.val_loss for r in outcome.state.history] for outcome in (ray, local)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, tensor in local.state.lambda_.items():
        torch.testing.assert_close(ray.state.lambda_[name], tensor, rtol=1e-5, atol=1e-5)
    # What a client measured once, the other processes read.
    assert len(list((tmp_path / "ray" / "statistics").glob("*.safetensors"))) == 12


def test_a_missing_ray_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without_ray(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "ray":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(ConfigError, match=r"pip install 'fedl2p\[ray\]'"):
        require_ray()
    with pytest.raises(ConfigError, match=r"federation\.engine is 'ray'"):
        run(tmp_path / "run", "federation.engine=ray")
    assert not (tmp_path / "run").exists()


def test_statistics_outlast_a_process(tmp_path: Path) -> None:
    names = ("b", "a.bn")  # not in the order of the alphabet
    statistics = ClientStatistics(
        bn_divergence=torch.tensor([0.5, 1.5]),
        layer_moments=torch.arange(6.0),
        channel_mean={name: torch.randn(3) for name in names},
        channel_var={name: torch.rand(3) for name in names},
        num_samples=17,
    )
    save_statistics(tmp_path / "3.safetensors", statistics)
    loaded = load_statistics(tmp_path / "3.safetensors", "cpu")
    assert loaded.num_samples == 17
    assert list(loaded.channel_mean) == list(loaded.channel_var) == list(names)
    assert torch.equal(loaded.bn_divergence, statistics.bn_divergence)
    assert torch.equal(loaded.layer_moments, statistics.layer_moments)
    assert all(torch.equal(loaded.channel_mean[name], statistics.channel_mean[name]) for name in names)
    assert all(torch.equal(loaded.channel_var[name], statistics.channel_var[name]) for name in names)
