"""The names of modules, without what wrappers put into them."""

from __future__ import annotations

from collections.abc import Container


# what `torch.compile` puts around a module; it is in the keys of a state dict, too
COMPILED = "_orig_mod"
# The wrappers of FSDP and of activation checkpointing: modules that are named in the model, but not in its state dict. Their
# hooks leave them out there, and put them in again when each of them loads.
NOT_IN_STATE_DICTS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
WRAPPERS = (COMPILED, *NOT_IN_STATE_DICTS)


def without(name: str, wrappers: Container[str]) -> str:
    """A full name without those of its parts that are wrappers."""
    return ".".join(part for part in name.split(".") if part not in wrappers)
