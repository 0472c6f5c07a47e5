"""Methods of PEFT that this package adds. Importing it registers them with PEFT."""

from .head_sparse import HeadSparseConfig, HeadSparseLayer, HeadSparseModel


__all__ = ["HeadSparseConfig", "HeadSparseLayer", "HeadSparseModel"]
