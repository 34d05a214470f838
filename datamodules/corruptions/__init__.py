"""Corruptions of images, by name and severity."""
