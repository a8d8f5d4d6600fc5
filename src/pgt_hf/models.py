"""``import pgt_hf.models``, as pushed model cards say: makes this package's networks known to timm."""

from .images.models import create_model, pgt_resnet

__all__ = ["create_model", "pgt_resnet"]
