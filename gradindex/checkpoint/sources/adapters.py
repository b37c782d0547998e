"""Adapters of PEFT: a folder with the trained weights alone, whose base is the task's model.

Source: peft, ``get_peft_model_state_dict``: what it saves is called as in the model, without the adapter's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...errors import CheckpointError
from .layouts import LAYOUTS, OneFile, is_folder, json_of

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Between a module and what an adapter trains instead of it.
_SAVED_MODULES = "modules_to_save"
# What a prompt is saved as.
_PROMPT = {"prompt_encoder.embedding.weight": "prompt_embeddings"}
# Options that change what an adapter computes, though not the shapes of its weights.
_COMPUTING = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out")
_WAY_OUT = "Make it with PeftModel.from_pretrained(base, path, is_trainable=True), or get_peft_model(base, config)."


@LAYOUTS.register("adapter")
class Adapter(OneFile):
    """An adapter's weights in one file, and how it was configured in another."""

    label = "PEFT adapter"

    @classmethod
    def found(cls, path: Path) -> Adapter | None:
        """See :class:`Layout`."""
        folder = path if is_folder(path) else path.parent
        if not (folder / CONFIG).is_file() or (folder == path.parent and path.name not in _WEIGHTS):
            return None
        files = [folder / name for name in _WEIGHTS if (folder / name).is_file()] if folder == path else [path]
        if not files:
            raise CheckpointError(
                f"{path} has {CONFIG}, but no weights ({_WEIGHTS[0]}). If it is still being written, wait; else copy "
                "the whole folder again."
            )
        return cls(path, [files[0], folder / CONFIG])

    @property
    def of_model(self) -> bool:
        """See :class:`Layout`: the base, always."""
        return True

    def fitting(self, weights: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        """See :class:`Layout`: names that the model has with the adapter's name in them.

        Raises:
            CheckpointError: the model has no adapter, another one, or one that computes otherwise.
        """
        configs = getattr(model, "peft_config", None)
        if not isinstance(configs, Mapping) or not configs:
            raise CheckpointError(
                f"{self.path} holds an adapter, but the task's model has none, so there is nothing that it adapts. "
                f"{_WAY_OUT}"
            )
        adapter = self._name(model, list(configs))
        self._check(configs[adapter], adapter)
        own = model.state_dict(keep_vars=True)
        places: dict[str, str] = {}
        for name in own:
            parts = name.split(".")
            if adapter in parts:
                plain = ".".join(part for part in parts if part not in (adapter, _SAVED_MODULES))
                for saved in (plain, plain.removesuffix(".weight"), _PROMPT.get(plain, plain)):
                    places.setdefault(saved, name)
        renamed = {places.get(name, name): value for name, value in weights.items()}
        trained = list(dict.fromkeys(places.values()))
        missing = [name for name in trained if name not in renamed and isinstance(own[name], Tensor)]
        if missing:
            raise CheckpointError(
                f"{self.files[0]} does not fit the model's adapter {adapter!r}: {missing[0]} is missing "
                f"({len(missing)} of {len(trained)}). {_WAY_OUT}"
            )
        return renamed

    def _name(self, model: nn.Module, names: Sequence[str]) -> str:
        """The model's adapter that this is one of: of its folder's name, the active one, or the only one."""
        folder = self.files[0].parent.name
        active = getattr(model, "active_adapter", None)
        if len(names) == 1 or folder in names:
            return folder if folder in names else names[0]
        return active if isinstance(active, str) and active in names else names[0]

    def _check(self, config: Any, adapter: str) -> None:
        saved = json_of(self.files[1])
        for name in _COMPUTING:
            own = getattr(config, name, None)
            own = getattr(own, "value", own)  # of an enumeration
            if name in saved and own is not None and saved[name] is not None and saved[name] != own:
                raise CheckpointError(
                    f"{self.files[1]} has {name} {saved[name]!r}, but the model's adapter {adapter!r} has {own!r}. "
                    f"{_WAY_OUT}"
                )
