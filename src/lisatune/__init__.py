"""LISA, Layerwise Importance Sampled AdamW (Pan et al., arXiv 2403.17919), for PyTorch models."""

__version__ = "0.1.0"
