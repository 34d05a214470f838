"""Several processes that share each batch compute what one process computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from core_cases import Case, ConvNet, close, conv_case, image_batches, make_case, named_inputs_case, seeded
from torch import Tensor

from fedl2p.core.differentiation import Autograd
from fedl2p.core.distributed import Shards, common_seed, own_part, total_count
from fedl2p.core.finetune import evaluation_loss
from fedl2p.core.hypergradients import FOMAML, IFT, HypergradientEstimator, Unrolled
from fedl2p.core.settings import BatchNormMode
from fedl2p.core.sharded import ShardedModel

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


def solve(
    case: Case, estimator: HypergradientEstimator, bn_mode: BatchNormMode = BatchNormMode.running
) -> dict[str, Tensor]:
    """Everything that a meta iteration computes from a client's tensors."""
    tuned = case.tune(estimator.history(len(case.train)))
    found = case.estimate(estimator, tuned=tuned, bn_mode=bn_mode)
    final = tuned.final
    loss = evaluation_loss(case.model, final, case.beta, case.val, bn_mode=bn_mode)
    named = {f"parameters/{name}": p for name, p in final.parameters.items()}
    named |= {f"buffers/{name}": b for name, b in final.buffers.items()}
    return named | {
        "losses": tuned.losses,
        "val_loss": loss,
        "hypergradient/val_loss": found.val_loss,
        "hypergradient/beta": found.beta,
        "hypergradient/eta": found.eta,
    }


def shared(case: Case) -> Case:
    """The same problem, of which this process has a part of each batch."""
    group = dist.group.WORLD
    return case._replace(
        model=ShardedModel.sharing(case.model, group),
        train=[own_part(batch, group) for batch in case.train],
        val=[own_part(batch, group) for batch in case.val],
    )


def assert_same(processes: list[dict[str, Tensor]], alone: dict[str, Tensor]) -> None:
    for found in processes:
        for name, expected in alone.items():
            close(found[name], expected, 1e-10)


@pytest.mark.parametrize("bn_mode", BatchNormMode)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_two_processes_compute_what_one_does(tmp_path: Path, name: str, bn_mode: BatchNormMode) -> None:
    case, estimator = conv_case(), ESTIMATORS[name]
    processes = in_processes(2, lambda: solve(shared(case), estimator, bn_mode), tmp_path)
    assert_same(processes, solve(case, estimator, bn_mode))


@pytest.mark.parametrize("name", ["unrolled", "ift, corrected"])
@pytest.mark.parametrize("differentiation", [Autograd(), Autograd(fused_batchnorm=True)], ids=["plain", "fused"])
def test_two_processes_do_so_by_autograd_too(tmp_path: Path, name: str, differentiation: Autograd) -> None:
    case = conv_case()
    alone = solve(case, ESTIMATORS[name])
    case = case._replace(differentiation=differentiation)
    assert_same(in_processes(2, lambda: solve(shared(case), ESTIMATORS[name]), tmp_path), alone)


def test_inputs_that_are_a_dict_are_shared(tmp_path: Path) -> None:
    case = named_inputs_case()
    processes = in_processes(2, lambda: solve(shared(case), Unrolled()), tmp_path)
    assert_same(processes, solve(case, Unrolled()))


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
