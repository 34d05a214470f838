"""A client whose processes share each batch: what it refuses, and that it learns and tests as in one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from core_cases import ConvNet
from lightning.pytorch.strategies import DDPStrategy

from fedl2p.client import FedL2PClient
from fedl2p.errors import ConfigError, DataError

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
