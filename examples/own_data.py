"""A data set of one's own, on which no single recipe of fine-tuning suits every client.

What: sensors that see which quarter of a small picture is the brightest. Half of them have drifted: their values are
      scaled and shifted, and batch norms do well to trust the sensor's own statistics. The others are as they left the
      factory, but meet only two of the four quarters, so that their own statistics mislead.
Run:  python examples/own_data.py
      or, from this folder, fedl2p run digits data.class_path=own_data.SensorData 'model.init_args={num_classes: 4}'
Time: TIME
"""

import sys

import torch
from torch.utils.data import TensorDataset

from fedl2p.datamodules import ClientData, FederatedDataModule


class SensorData(FederatedDataModule):
    """Pictures of 8x8 values; the label is the quarter that is brightest."""

    num_classes = 4

    def build_clients(self):
        generator = torch.Generator().manual_seed(self.seed)
        for pool, count in (("pretrain", 8), ("seen", 40), ("unseen", 40)):
            for i in range(count):
                drifted = pool != "pretrain" and i % 2 == 1
                quarters = torch.randperm(4, generator=generator)[: 4 if drifted or pool == "pretrain" else 2]
                y = quarters[torch.randint(len(quarters), (80,), generator=generator)]
                x = torch.randn(80, 1, 2, 4, 2, 4, generator=generator)
                x[torch.arange(80), 0, y // 2, :, y % 2] += 0.6
                if drifted:
                    gain, offset = torch.rand(2, generator=generator)
                    x = x * (0.3 + 3 * gain) + 4 * (offset - 0.5)
                x = x.reshape(80, 1, 8, 8)
                train, val, test = (TensorDataset(x[a:b], y[a:b]) for a, b in ((0, 16), (16, 32), (32, 80)))
                yield ClientData(name=f"{pool}-{i}", pool=pool, train=train, val=val, test=test)


if __name__ == "__main__":
    from fedl2p.cli import main

    model = "model.init_args={num_classes: 4}"
    sys.exit(main(["run", "digits", "data.class_path=own_data.SensorData", model, *sys.argv[1:]]))
