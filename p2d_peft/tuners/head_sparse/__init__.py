"""HeadSparse: fine-tuning of chosen attention heads, as a method of PEFT."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from .config import HEAD_SPARSE, HeadSparseConfig
from .layer import HeadSparseLayer, WeightSlice
from .linear import Linear
from .lora import LoraReport, convert_to_lora, lora_report, save_as_lora
from .model import HeadSparseModel


__all__ = [
    "HeadSparseConfig",
    "HeadSparseLayer",
    "HeadSparseModel",
    "Linear",
    "LoraReport",
    "WeightSlice",
    "convert_to_lora",
    "lora_report",
    "save_as_lora",
]

# A name can be registered once. Where this module is imported anew (a reload, a test runner that purges modules), the
# earlier registration gives way to the new classes; a method of another package with the same name does not.
_registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(HEAD_SPARSE)
if _registered is not None and _registered.__module__ == HeadSparseConfig.__module__:
    for _mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        del _mapping[HEAD_SPARSE]
register_peft_method(name="head_sparse", config_cls=HeadSparseConfig, model_cls=HeadSparseModel)
