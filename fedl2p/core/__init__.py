"""The mathematical core: pure functions over explicit tensors."""
