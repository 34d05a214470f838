"""The federated rounds: Algorithm 1, a ClientApp, the engines that carry messages, and checkpoints.

Nothing is imported here, so that `import fedl2p` stays free of Flower.
"""
