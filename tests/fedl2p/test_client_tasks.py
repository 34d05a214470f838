"""`FedL2PClient` on tasks of any kind: regression, tokens, and inputs of several tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from client_cases import make_trainer, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import MulticlassAccuracy

from fedl2p import FOMAML, FedL2PClient, HypergradientEstimator, Unrolled, collect_statistics, make_episode, stack

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
RATES = {"bn_net": 0.1, "lr_net": 0.1, "base_lr": 0.1}
IGNORED = -100


class Samples(Dataset[Any]):
    """Samples that are made beforehand."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def loader(samples: list[Any], batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(Samples(samples), batch_size=batch_size)


def fit_and_test(client: FedL2PClient, folder: Path, train: list[Any], val: list[Any], test: list[Any]) -> Any:
    quiet_trainer(folder).fit(client, loader(train), loader(val))
    return quiet_trainer(folder).test(client, loader(test), verbose=False)[0]  # a Trainer that has no training data


# Regression


class Regressor(nn.Module):
    """Two tensors in, a number out."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.out = nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Linear(16, 1)

    def forward(self, features: Tensor, scale: Tensor) -> Tensor:
        return self.out(torch.tanh(self.norm(self.hidden(features * scale)))).squeeze(-1)


def numbers(count: int, seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 3, generator=generator)
    scale = 0.5 + torch.rand(count, 1, generator=generator)
    targets = (features * scale).sum(1) * 0.5 + 0.2
    return [((features[i], scale[i]), targets[i]) for i in range(count)]


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs, targets)


@pytest.mark.parametrize("estimator", [Unrolled(), FOMAML()], ids=["unrolled", "fomaml"])
def test_regression_from_two_tensors_learns_and_is_measured(tmp_path: Path, estimator: HypergradientEstimator) -> None:
    torch.manual_seed(0)
    client = FedL2PClient(
        Regressor(),
        loss_fn=mean_squared_error,
        metrics={"mae": MeanAbsoluteError()},
        estimator=estimator,
        base_lr=0.05,
        meta_lr=RATES,
        meta_iterations=8,
        finetune_epochs=3,
    )
    measured = fit_and_test(client, tmp_path, numbers(32, 0), numbers(16, 1), numbers(24, 2))
    assert set(measured) == {"test_loss", "test_mae"}  # no accuracy without classes
    assert client.val_losses[-1] < client.val_losses[0]
    features, scale, targets = (
        torch.stack([s[0][0] for s in numbers(24, 2)]),
        torch.stack([s[0][1] for s in numbers(24, 2)]),
        torch.stack([s[1] for s in numbers(24, 2)]),
    )
    outputs = client((features, scale))
    assert measured["test_loss"] == pytest.approx(float(mean_squared_error(outputs, targets)), rel=1e-5)
    assert measured["test_mae"] == pytest.approx(float((outputs - targets).abs().mean()), rel=1e-5)


# Tokens, in batches as Hugging Face's collators make them: a dict of tensors


class Tagger(nn.Module):
    """A label for each token, from its own and its neighbours' embeddings."""

    def __init__(self, labels: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.mix, self.norm, self.out = nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.Linear(8, labels)

    def forward(self, *, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.embedding(input_ids) * attention_mask[..., None]
        hidden = torch.tanh(self.norm(self.mix(hidden.transpose(1, 2)))).transpose(1, 2)
        return {"logits": self.out(hidden)}


def token_loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


class TokenAccuracy(MulticlassAccuracy):
    """Over the tokens that have a label."""

    def update(self, outputs: dict[str, Tensor], targets: Tensor) -> None:
        super().update(outputs["logits"].flatten(0, 1), targets.flatten())


def sentences(count: int, seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(12, (count, 6), generator=generator)
    mask = (torch.arange(6) < torch.randint(3, 7, (count, 1), generator=generator)).long()
    labels = torch.where(mask.bool(), ids % 3, IGNORED)
    return [({"input_ids": ids[i], "attention_mask": mask[i]}, labels[i]) for i in range(count)]


def tagger(**options: Any) -> FedL2PClient:
    torch.manual_seed(0)
    return FedL2PClient(
        Tagger(),
        loss_fn=token_loss,
        metrics={"acc": TokenAccuracy(3, average="micro", ignore_index=IGNORED)},
        base_lr=0.1,
        meta_lr=RATES,
        meta_iterations=6,
        finetune_epochs=3,
        **options,
    )


def test_tokens_from_a_dict_of_tensors_learn_and_are_measured(tmp_path: Path) -> None:
    client = tagger()
    measured = fit_and_test(client, tmp_path, sentences(32, 0), sentences(16, 1), sentences(24, 2))
    assert client.val_losses[-1] < client.val_losses[0]
    whole = [
        {key: torch.stack([s[0][key] for s in sentences(24, 2)]) for key in ("input_ids", "attention_mask")},
        torch.stack([s[1] for s in sentences(24, 2)]),
    ]
    answers = client(whole[0])["logits"].argmax(-1)
    known = whole[1] != IGNORED
    assert measured["test_acc"] == pytest.approx(float((answers == whole[1])[known].float().mean()), rel=1e-5)


def test_batch_statistics_need_the_whole_set_of_tokens_at_once(tmp_path: Path) -> None:
    client = tagger(evaluation_statistics="batch")
    measured = fit_and_test(client, tmp_path, sentences(16, 0), sentences(8, 1), sentences(24, 2))
    assert 0 < measured["test_loss"] < 10


# Episodes of a user's own loader


def test_a_cohort_of_episodes_moves_the_nets_by_the_mean_of_its_clients(tmp_path: Path) -> None:
    """Two clients in one episode against each of them alone, all from one lambda."""

    def made() -> FedL2PClient:
        torch.manual_seed(0)
        return FedL2PClient(
            Regressor(), loss_fn=mean_squared_error, base_lr=0.05, meta_lr=RATES, meta_iterations=1, finetune_epochs=2
        )

    episodes = [_episode(made(), seed) for seed in (0, 7)]
    before = {name: p.detach().clone() for name, p in made().meta_nets.named_parameters()}
    moves = []
    for batch in (*episodes, stack(episodes)):
        client = made()
        beat = DataLoader([batch], batch_size=None, collate_fn=lambda episode: episode)  # type: ignore[arg-type, var-annotated]
        make_trainer(tmp_path).fit(client, beat, beat)
        moves.append({name: p.detach() - before[name] for name, p in client.meta_nets.named_parameters()})
    first, second, together = moves
    assert any(float(move.abs().max()) > 0 for move in together.values())
    for name, move in together.items():
        torch.testing.assert_close(move, (first[name] + second[name]) / 2, rtol=0, atol=1e-6)


def _episode(client: FedL2PClient, seed: int) -> Any:
    train, val = list(loader(numbers(16, seed))), list(loader(numbers(8, seed + 1)))
    statistics = collect_statistics(client.model, train)
    return make_episode(client.learner.model, statistics, train * 2, val)
