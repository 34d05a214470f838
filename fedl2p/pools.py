"""The names of the groups that clients belong to, and of the sets that each client's samples are in."""

POOLS = ("pretrain", "seen", "unseen")
"""Clients that make the global model, that learn the policy together, and that only come afterwards."""

MEASURED_POOLS = ("seen", "unseen")
"""The pools whose clients are personalized and tested; those that pretrain are not."""

ROLES = ("train", "val", "test")
"""A client's samples for fine-tuning, for the meta-learning loss, and for reports alone."""
