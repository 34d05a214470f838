"""The project's error types: one clear sentence each, saying what is wrong, where, and what is allowed."""


class FedL2PError(Exception):
    """Base of every error that this project raises on purpose."""


class ConfigError(FedL2PError):
    """A configuration key is unknown, of the wrong type, or has an impossible value."""


class DataError(FedL2PError):
    """A data set cannot be read, or cannot be split as asked."""


class ModelError(FedL2PError):
    """A model cannot be used as it is: a layer is not supported, or weights do not fit."""


class FederationError(FedL2PError):
    """A federated run cannot go on: too few clients gave a usable answer."""


class RunFolderError(FedL2PError):
    """A run's folder cannot be written or resumed without losing what it holds."""
