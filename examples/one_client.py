"""One client in an ordinary Lightning Trainer: it learns how to fine-tune a model for its own data.

What: one client of scikit-learn's handwritten digits, with the model that `fedl2p run digits` pretrains. Three meta
      iterations, then fine-tuning with the learned recipe, then the test.
Run:  fedl2p run digits output_dir=runs/digits/first
      python examples/one_client.py runs/digits/first
Time: 10 seconds on one core, once the run is there.
"""

import sys
from pathlib import Path

import lightning as L

from fedl2p import FedL2PClient
from fedl2p.datamodules import DigitsDataModule
from fedl2p.models import SmallConvNet, load_weights

model = SmallConvNet(widths=(8, 16, 32))  # or any pretrained model
load_weights(model, Path(sys.argv[1]) / "global_model.safetensors")
data = DigitsDataModule(seed=0)
data.setup()
datamodule = data.client(data.pool("seen")[0])  # or any DataModule with batches of (inputs, targets)

client = FedL2PClient(model, num_classes=10)
trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(client, datamodule=datamodule)  # learns the recipe: beta and eta
trainer.test(client, datamodule=datamodule)  # personalizes, then tests
