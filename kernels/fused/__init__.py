"""Fused kernels, each beside the PyTorch expression it must equal."""

from stepdistill.kernels.cfg import cfg_affine, cfg_affine_reference

__all__ = ["cfg_affine", "cfg_affine_reference"]
