"""The networks of the papers, and the small one of the demo."""

from fedl2p.models.small import SmallConvNet

__all__ = ["SmallConvNet"]
