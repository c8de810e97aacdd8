"""The PEFT loader: a `PeftModel` around a dispatched model leaves the dispatch as it is.

PEFT takes a model with "cpu" or "disk" in its `hf_device_map` for one of Accelerate's: it removes the hooks, and
dispatches the model anew. Where it sees no map it does neither, and an adapter streams with the block it belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..dispatch.attach import map_hidden, watch_added
from ..seams import AnySeam, Seam


class PeftLoader:
    """Serves `PeftModel.from_pretrained` and `load_adapter`, also of mixed models, and adapters that are injected."""

    name = "peft"
    library = "peft"
    trigger = "peft.peft_model"

    def seams(self) -> Sequence[AnySeam]:
        return [
            Seam("peft.peft_model", "PeftModel.from_pretrained", ("model", "model_id"), from_pretrained),
            Seam("peft.peft_model", "PeftModel.load_adapter", ("model_id", "adapter_name"), load_adapter),
            Seam("peft.tuners.tuners_utils", "BaseTuner.inject_adapter", ("model", "adapter_name"), inject_adapter),
            Seam("peft.mixed_model", "PeftMixedModel.from_pretrained", ("model", "model_id"), from_pretrained),
        ]


def from_pretrained(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with map_hidden(kwargs["model"] if "model" in kwargs else args[0]):
        return wrapped(*args, **kwargs)


def load_adapter(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with map_hidden(instance.get_base_model()):
        return wrapped(*args, **kwargs)


def inject_adapter(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = wrapped(*args, **kwargs)
    watch_added(kwargs["model"] if "model" in kwargs else args[0])
    return result
