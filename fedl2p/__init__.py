"""FedL2P: federated learning to personalize, on PyTorch Lightning and Flower.

Clients learn together, without moving data, two small networks that read a client's data statistics and answer with
that client's batch-norm mixing (beta) and layer-wise learning rates (eta).
"""

__version__ = "0.1.0"
