"""The federation of digits: who has which images, and that nobody is tested on what another trained on."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from fedl2p.datamodules import ClientData, DigitsDataModule
from fedl2p.datamodules.digits import DOMAINS, _load
from fedl2p.errors import DataError

ROLES = ("train", "val", "test")


@pytest.fixture(scope="module")
def digits() -> DigitsDataModule:
    return DigitsDataModule()


def plans(module: DigitsDataModule) -> list[Any]:
    return module._plans(_load()[1])


def counts(client: ClientData, role: str) -> np.ndarray:
    return np.bincount(getattr(client, role).tensors[1], minlength=10)


def same(a: ClientData, b: ClientData) -> bool:
    return a.name == b.name and all(
        torch.equal(mine, yours)
        for role in ROLES
        for mine, yours in zip(getattr(a, role).tensors, getattr(b, role).tensors, strict=True)
    )


def test_pools_names_and_shapes(digits: DigitsDataModule) -> None:
    assert [len(digits.pool(pool)) for pool in ("pretrain", "seen", "unseen")] == [10, 48, 24]
    assert [client.pool for client in digits.clients] == ["pretrain"] * 10 + ["seen"] * 48 + ["unseen"] * 24
    assert digits.clients[0].name == "pretrain-clean-00"
    assert digits.clients[10].name == "seen-noise-00"
    assert digits.clients[81].name == "unseen-inversion-03"
    assert digits.input_shape == (1, 8, 8) and digits.num_classes == 10
    for client in digits.clients:
        for role in ROLES:
            inputs, labels = getattr(client, role).tensors
            assert inputs.dtype == torch.float32 and labels.dtype == torch.int64
            assert inputs.shape == (len(labels), 1, 8, 8)
            assert inputs.min() >= 0 and inputs.max() <= 1


def test_sizes_and_severities(digits: DigitsDataModule) -> None:
    rows = digits.describe()
    assert {(row["train"], row["val"], row["test"]) for row in rows[:10]} == {(37, 8, 8)}
    for pool, each in (("seen", 8), ("unseen", 4)):
        for domain in DOMAINS:
            own = [row for row in rows if row["pool"] == pool and row["domain"] == domain]
            assert sorted(row["train"] for row in own) == sorted([8, 16, 32, 64] * (each // 4))
            severities = [row["details"]["severity"] for row in own]
            unshifted = {8: [0.0] * 3, 4: [0.0]}[each]
            assert severities == pytest.approx(unshifted + np.linspace(0, 1, each - len(unshifted) + 1)[1:].tolist())
    shifted = rows[10:]
    assert {(row["train"], row["val"], row["test"]) for row in shifted} == {
        (8, 8, 8),
        (16, 8, 8),
        (32, 16, 16),
        (64, 32, 32),
    }
    assert all(row["details"]["size"] == row["train"] for row in rows)


def test_sizes_are_not_tied_to_severities(digits: DigitsDataModule) -> None:
    orders = {
        tuple(row["train"] for row in digits.describe() if row["pool"] == "seen" and row["domain"] == domain)
        for domain in DOMAINS
    }
    assert len(orders) == len(DOMAINS)


@pytest.mark.parametrize("seed", [0, 1])
def test_pools_share_no_image(seed: int) -> None:
    used: dict[str, set[int]] = {"pretrain": set(), "seen": set(), "unseen": set()}
    for plan in plans(DigitsDataModule(seed=seed)):
        used[plan.pool].update(*(plan.images[role].tolist() for role in ROLES))
    for one, other in combinations(used.values(), 2):
        assert one and not one & other


@pytest.mark.parametrize("seed", [0, 1])
def test_no_client_is_tested_on_what_another_trained_on(seed: int) -> None:
    used: dict[str, set[int]] = {role: set() for role in ROLES}
    for plan in plans(DigitsDataModule(seed=seed)):
        for role in ROLES:
            used[role].update(plan.images[role].tolist())
    for one, other in combinations(used.values(), 2):
        assert one and not one & other


def test_a_domain_deals_no_image_twice(digits: DigitsDataModule) -> None:
    dealt: dict[tuple[str, str], list[int]] = {}
    for plan in plans(digits):
        for role in ROLES:
            dealt.setdefault((plan.pool, plan.domain), []).extend(plan.images[role].tolist())
    assert len(dealt) == 13
    for images in dealt.values():
        assert len(set(images)) == len(images)


def test_domains_use_the_same_images(digits: DigitsDataModule) -> None:
    noise, blur = (
        {i for plan in plans(digits) if plan.domain == domain for i in plan.images["train"].tolist()}
        for domain in ("noise", "blur")
    )
    assert len(noise & blur) > 100


def test_clients_hold_the_images_of_their_plan(digits: DigitsDataModule) -> None:
    images, labels = _load()
    for client, plan in zip(digits.clients, plans(digits), strict=True):
        for role in ROLES:
            inputs, own_labels = getattr(client, role).tensors
            assert np.array_equal(own_labels.numpy(), labels[plan.images[role]])
            assert torch.equal(inputs, images[plan.images[role]]) == (plan.severity == 0)


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5, 5.0, 1000.0])
def test_a_client_has_the_same_labels_in_all_its_sets(alpha: float) -> None:
    for client in DigitsDataModule(alpha=alpha).clients[10:]:
        train = counts(client, "train")
        for role in ("val", "test"):
            own = counts(client, role)
            assert (np.abs(own - train * own.sum() / train.sum()) < 1).all(), (client.name, role)


def test_alpha_sets_the_skew() -> None:
    def largest_share(alpha: float) -> float:
        clients = DigitsDataModule(alpha=alpha).clients[10:]
        return float(np.mean([counts(c, "train").max() / counts(c, "train").sum() for c in clients]))

    shares = [largest_share(alpha) for alpha in (0.05, 0.5, 1000.0)]
    assert shares[0] > shares[1] + 0.1 > shares[2] + 0.2


def test_pretrain_clients_are_balanced(digits: DigitsDataModule) -> None:
    for client in digits.clients[:10]:
        together = sum(counts(client, role) for role in ROLES)
        assert together.sum() == 53 and together.min() >= 4 and together.max() <= 7


def test_the_seed_decides_and_nothing_else(digits: DigitsDataModule) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    again, other = DigitsDataModule(), DigitsDataModule(seed=1)
    assert all(map(same, digits.clients, again.clients))
    assert not any(map(same, digits.clients, other.clients))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_a_domain_does_not_depend_on_the_others(digits: DigitsDataModule) -> None:
    alone = DigitsDataModule(domains=("blur",), seen_clients=8, unseen_clients=4)
    blurred = [client for client in digits.clients if client.domain == "blur"]
    assert len(blurred) == 12
    assert all(map(same, blurred, alone.clients[10:]))


def test_clients_are_spread_over_domains_and_one_alone_is_shifted() -> None:
    small = DigitsDataModule(
        domains=("blur", "noise"), pretrain_clients=1, seen_clients=3, unseen_clients=2, train_sizes=[2]
    )
    assert [client.name for client in small.clients] == [
        "pretrain-clean-00",
        "seen-blur-00",
        "seen-blur-01",
        "seen-noise-00",
        "unseen-blur-00",
        "unseen-noise-00",
    ]
    assert [client.details["severity"] for client in small.clients] == [0, 0, 1, 1, 1, 1]


def test_domains_may_be_kept_aside_for_unseen_clients() -> None:
    data = DigitsDataModule(unseen_domains=["inversion", "blur"], seen_clients=32)
    domains = {pool: {data.clients[i].domain for i in data.pool(pool)} for pool in ("seen", "unseen")}
    assert domains == {"seen": set(DOMAINS) - {"inversion", "blur"}, "unseen": set(DOMAINS)}
    assert len(data.pool("seen")) == 32 and len(data.pool("unseen")) == 24
    for wrong in (["fog"], list(DOMAINS)):
        with pytest.raises(DataError, match=r"unseen_domains is .*; it must be some, and not all, of noise, blur"):
            DigitsDataModule(unseen_domains=wrong)


@pytest.mark.parametrize("pretrain_clients", [1, 53])
def test_pretrain_clients_always_have_all_sets(pretrain_clients: int) -> None:
    module = DigitsDataModule(pretrain_clients=pretrain_clients)
    assert len(module.pool("pretrain")) == pretrain_clients


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"domains": ("fog",)}, "they must be some of noise, blur"),
        ({"domains": ("blur", "blur")}, "each at most once"),
        ({"domains": ()}, "they must be some of"),
        ({"pretrain_clients": 0}, "from 1 to 53"),
        ({"pretrain_clients": 54}, "from 1 to 53"),
        ({"seen_clients": 5}, "seen_clients is 5; it must be at least 6"),
        ({"unseen_clients": 0}, "unseen_clients is 0"),
        ({"train_sizes": (8, 1)}, "at least 2"),
        ({"train_sizes": ()}, "at least 2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_arguments_are_named_at_once(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        DigitsDataModule(**wrong)


@pytest.mark.parametrize(
    ("greedy", "message"),
    [
        (
            {"train_sizes": (64,)},
            r"The 8 seen clients of a domain want 512 train images, but the pool has 3\d\d",
        ),
        ({"train_sizes": (2,), "seen_clients": 240}, "The 40 seen clients of a domain want 320 val images"),
        ({"unseen_clients": 60}, "The 10 unseen clients of a domain want"),
    ],
)
def test_a_domain_with_too_few_images_is_named(greedy: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        DigitsDataModule(**greedy).setup()
