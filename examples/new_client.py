"""A new client, who took no part in the rounds, asks trained networks for its recipe and personalizes.

What: a camera that `examples/own_data.py` never saw; its recipe comes from one forward pass over its training data.
Run:  python examples/own_data.py output_dir=runs/own_data
      python examples/new_client.py runs/own_data
Time: 5 seconds on one core, once the run is there.
"""

import sys
from pathlib import Path

import lightning as L
from own_data import CameraData

from fedl2p.client import FedL2PClient
from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.models import SmallConvNet, load_weights
from fedl2p.policy import load_policy

run = Path(sys.argv[1])
model = SmallConvNet(num_classes=4, widths=(8, 16), momentum=0.5)
load_weights(model, run / "global_model.safetensors")
model = convert_batchnorm(model)
nets = load_policy(run / "meta_nets.safetensors", model)

data = CameraData(seed=1)  # other cameras than in the run
data.setup()
client = FedL2PClient(model, num_classes=4, meta_nets=nets, finetune_epochs=5, evaluation_statistics="batch")
trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.test(client, datamodule=data.client(data.pool("unseen")[0]))

recipe = client.hyperparameters
for name, beta in zip(nets.batchnorm_names, recipe.beta.tolist(), strict=True):
    print(f"beta of {name}: {beta:.2f}")
for name, eta in zip(nets.parameter_names, recipe.eta.tolist(), strict=True):
    print(f"eta of {name}: {eta:.3f}")
