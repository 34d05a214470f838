"""Several processes that share each batch compute what one process computes."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from core_cases import Case, ConvNet, close, conv_case, image_batches, make_case, seeded
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from fedl2p.client import FedL2PClient
from fedl2p.core.distributed import Shards, common_seed, own_part, total_count
from fedl2p.core.finetune import evaluation_loss
from fedl2p.core.hypergradients import FOMAML, IFT, HypergradientEstimator, Unrolled
from fedl2p.errors import ConfigError, DataError

ESTIMATORS: dict[str, HypergradientEstimator] = {
    "unrolled": Unrolled(),
    "unrolled, last": Unrolled(steps=1),
    "fomaml": FOMAML(),
    "ift, corrected": IFT(neumann_terms=2),
    "ift, paper": IFT(form="paper", neumann_terms=2),
}


def in_processes(count: int, work: Callable[[], Any], folder: Path) -> list[Any]:
    """What `work()` returns in each of `count` processes that form a group."""
    mp.start_processes(_join, (count, work, folder), nprocs=count, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _join(rank: int, count: int, work: Callable[[], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    torch.save(work(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def solve(case: Case, estimator: HypergradientEstimator, statistics: str = "running") -> dict[str, Tensor]:
    """Everything that a meta iteration computes from a client's tensors."""
    problem = case.problem()._replace(statistics=statistics)
    found = estimator(case.model, problem)
    final = problem.tuned.final
    loss = evaluation_loss(case.model, final, case.beta, case.val, statistics=statistics)  # type: ignore[arg-type]
    named = {f"parameters/{name}": p for name, p in final.parameters.items()}
    named |= {f"buffers/{name}": b for name, b in final.buffers.items()}
    return named | {
        "losses": problem.tuned.losses,
        "val_loss": loss,
        "hypergradient/val_loss": found.val_loss,
        "hypergradient/beta": found.beta,
        "hypergradient/eta": found.eta,
    }


def shared(case: Case) -> Case:
    """The same problem, of which this process has a part of each batch."""
    group = dist.group.WORLD
    return case._replace(
        model=dataclasses.replace(case.model, group=group),
        train=[own_part(batch, group) for batch in case.train],
        val=[own_part(batch, group) for batch in case.val],
    )


def assert_same(processes: list[dict[str, Tensor]], alone: dict[str, Tensor]) -> None:
    for found in processes:
        for name, expected in alone.items():
            close(found[name], expected, 1e-10)


@pytest.mark.parametrize("statistics", ["running", "batch"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_two_processes_compute_what_one_does(tmp_path: Path, name: str, statistics: str) -> None:
    case, estimator = conv_case(), ESTIMATORS[name]
    processes = in_processes(2, lambda: solve(shared(case), estimator, statistics), tmp_path)
    assert_same(processes, solve(case, estimator, statistics))


@pytest.mark.parametrize("name", ["unrolled", "ift, corrected"])
def test_a_process_can_be_without_samples_of_a_batch(tmp_path: Path, name: str) -> None:
    """Batches of 2 and 3 among three processes."""
    case = make_case(seeded(ConvNet), image_batches(4, 2), image_batches(3, seed=5))
    processes = in_processes(3, lambda: solve(shared(case), ESTIMATORS[name]), tmp_path)
    assert_same(processes, solve(case, ESTIMATORS[name]))


def test_a_cumulative_average_of_statistics_is_shared_as_well(tmp_path: Path) -> None:
    case = conv_case(momentum=None)
    processes = in_processes(2, lambda: solve(shared(case), Unrolled()), tmp_path)
    assert_same(processes, solve(case, Unrolled()))


def test_counts_seeds_and_sums(tmp_path: Path) -> None:
    def work() -> dict[str, Tensor]:
        rank, group = dist.get_rank(), dist.group.WORLD
        torch.manual_seed(rank)
        shards = Shards.of(group, 3 + rank)
        a, b = shards.from_shards(torch.tensor([1.0, rank]), torch.tensor(10.0))
        return {
            "count": torch.tensor(total_count(2 + rank, group)),
            "total": torch.tensor(shards.total),
            "seed": torch.tensor(common_seed(group)),
            "a": a,
            "b": b,
        }

    first, second = in_processes(2, work, tmp_path)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
    assert (int(first["count"]), int(first["total"]), float(first["b"])) == (5, 7, 20.0)
    assert first["a"].tolist() == [2.0, 1.0]
    assert total_count(4, None) == 4


SCRIPT = '''
import sys
import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from fedl2p.client import FedL2PClient
from fedl2p.models import SmallConvNet


class Data(L.LightningDataModule):
    """A plain user's: shuffled by torch's generator."""

    def loader(self, seed, count, shuffle=False):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.rand(count, 1, 8, 8, generator=generator)
        labels = torch.randint(3, (count,), generator=generator)
        return DataLoader(TensorDataset(inputs, labels), batch_size=6, shuffle=shuffle)

    def train_dataloader(self):
        return self.loader(0, 20)

    def val_dataloader(self):
        return self.loader(1, 9)

    def test_dataloader(self):
        return self.loader(2, 12)


def main(devices, statistics, output):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    client = FedL2PClient(
        SmallConvNet(widths=[4, 4, 4], num_classes=3),
        num_classes=3,
        meta_iterations=2,
        finetune_epochs=2,
        base_lr=0.1,
        meta_lr={"bn_net": 0.1, "lr_net": 0.1, "base_lr": 0.05},
        evaluation_statistics=statistics,
    )
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    options = dict(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", **quiet)
    L.Trainer(use_distributed_sampler=True, num_sanity_val_steps=0, limit_val_batches=2, **options).fit(
        client, datamodule=Data()
    )
    trainer = L.Trainer(use_distributed_sampler=False, **options)
    measured = trainer.test(client, datamodule=Data(), verbose=False)[0]
    if trainer.is_global_zero:
        state = {name: p.detach() for name, p in client.meta_nets.named_parameters()}
        state |= {name: torch.as_tensor(value) for name, value in measured.items()}
        state["val_losses"] = torch.tensor(client.val_losses)
        torch.save(state, output)


main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
'''


class Many:
    """A Trainer of two processes, as far as a client asks."""

    world_size = 2
    datamodule: object = object()
    strategy: object = DDPStrategy()


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [("datamodule", None, DataError, "needs a DataModule"), ("strategy", object(), ConfigError, "'ddp'")],
)
def test_what_a_client_cannot_share_is_refused(name: str, value: object, error: type[Exception], message: str) -> None:
    client = FedL2PClient(ConvNet().float(), num_classes=3)
    client._trainer = type("Trainer", (Many,), {name: value})()  # type: ignore[assignment]
    with pytest.raises(error, match=message):
        client.setup("fit") if name == "strategy" else client._processes()


@pytest.mark.slow
@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_a_client_learns_and_tests_the_same_by_ddp_in_two_processes(tmp_path: Path, statistics: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    found = {}
    for devices in (1, 2):
        command = [
            sys.executable,
            str(tmp_path / "script.py"),
            str(devices),
            statistics,
            str(tmp_path / f"{devices}.pt"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found[devices] = torch.load(tmp_path / f"{devices}.pt", weights_only=True)
    assert found[1].keys() == found[2].keys() and "test_acc" in found[1]
    for name, tensor in found[1].items():
        torch.testing.assert_close(found[2][name], tensor, rtol=0, atol=1e-5)
