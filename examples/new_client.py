"""A new client, who took no part in the rounds, asks a trained policy for its recipe and gets a model of its own.

What: a camera that `examples/own_data.py` never saw; its recipe comes from one pass over its training data.
Run:  python examples/own_data.py output_dir=runs/own_data
      python examples/new_client.py runs/own_data
Time: 5 seconds on one core, once the run is there.
"""

import sys
from pathlib import Path

import torch
from own_data import CameraData

from fedl2p import Policy
from fedl2p.models import SmallConvNet, load_weights

run = Path(sys.argv[1])
model = SmallConvNet(num_classes=4, widths=(8, 16), momentum=0.5)
load_weights(model, run / "global_model.safetensors")
model.eval()

data = CameraData(seed=1)  # other cameras than in the run
data.setup()
camera = data.client(data.pool("unseen")[0])

policy = Policy.load(run)
hyperparameters = policy(model, camera.train_dataloader())
for name, beta in hyperparameters.beta.items():
    print(f"beta of {name}: {beta:.2f}")
for name, eta in hyperparameters.eta.items():
    print(f"eta of {name}: {eta:.3f}")

personalized = policy.personalize(model, camera.train_dataloader())
model.load_state_dict(personalized.state_dict(), strict=True)  # a plain model: it fits the class that it came from
inputs, labels = next(iter(camera.test_dataloader()))
with torch.no_grad():
    accuracy = (model(inputs).argmax(1) == labels).float().mean()
print(f"test accuracy: {accuracy:.2f}")
