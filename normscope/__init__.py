"""Normalization for PyTorch as one idea."""
