"""A data set of one's own, on which no single recipe of fine-tuning suits every client.

What: cameras that tell four textures apart. Every second one gives negatives, and has 32 labelled pictures to learn
      from: it needs large steps. The others are badly exposed and have labelled few pictures, of two textures only,
      though they meet all four: they need their own batch-norm statistics, and large steps would make them forget.
Run:  python examples/own_data.py
Time: 1 minute on one core. It printed (seed 0, one CPU core, torch 2.15; accuracy in %, mean ± SD over 24 clients):

          | Method                      |        seen |      unseen |
          | Global model                | 40.5 ± 41.7 | 39.8 ± 40.5 |
          | FT (BN C)                   | 72.7 ± 23.8 | 74.2 ± 22.5 |
          | FT (BN G)                   | 37.8 ± 14.7 | 34.1 ± 14.8 |
          | FT (BN I)                   | 71.4 ± 24.4 | 72.9 ± 22.5 |
          | FedL2P                      | 87.8 ± 13.3 | 89.6 ± 13.7 |
          | FedL2P, statistics shuffled | 65.7 ± 11.2 | 64.7 ± 13.0 |
"""

import sys

import torch
from torch.utils.data import Subset, TensorDataset

from fedl2p.datamodules import ClientData, FederatedDataModule


class CameraData(FederatedDataModule):
    """Pictures of 8x8 values; the label is the texture: rows, columns, dots or holes."""

    num_classes = 4

    def build_clients(self):
        """Ordinary cameras for the global model, then those that personalize it, then those that were never seen."""
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.tensor([1.0, 0.0]).repeat(4)[:, None].expand(8, 8)
        textures = torch.stack([rows, rows.T, rows * rows.T, 1 - rows * rows.T])
        for pool, count in (("pretrain", 8), ("seen", 24), ("unseen", 24)):
            for i in range(count):
                y = torch.randint(4, (112,), generator=generator)
                x = textures[y] + 0.6 * torch.randn(112, 8, 8, generator=generator)
                chosen = torch.arange(32)
                if pool != "pretrain" and i % 2 == 0:
                    x = 1 - x
                elif pool != "pretrain":
                    gain, offset = torch.rand(2, generator=generator)
                    x = (0.2 + gain) * x + 2 * offset
                    chosen = chosen[y[:32] % 2 == i // 2 % 2][:8]
                samples = TensorDataset(x[:, None], y)
                train, val, test = (Subset(samples, list(p)) for p in (chosen, range(32, 48), range(48, 112)))
                kind = "negative" if i % 2 == 0 else "exposure"
                yield ClientData(name=f"{pool}-{i}", pool=pool, domain=kind, train=train, val=val, test=test)


if __name__ == "__main__":
    from fedl2p.cli import main

    model = "model.init_args={num_classes: 4, widths: [8, 16], momentum: 0.5}"
    short = ["pretraining.rounds=10", "federation.rounds=30", "federation.client_fraction=0.5", "baselines.l2p=false"]
    sys.exit(main(["run", "digits", "data.class_path=own_data.CameraData", model, *short, *sys.argv[1:]]))
