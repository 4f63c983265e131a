"""``equipoise_<type>`` configuration and model classes, registered with transformers' Auto classes.

A directory holds either full weights or a delta: configuration, mixers, LoRA in a sub-folder, the donor by
name. ``AutoModelForCausalLM.from_pretrained(directory)`` loads both once equipoise is imported.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from equipoise._register import PREFIX
from equipoise.config import HybridConfig, parse
from equipoise.files import write_atomically
from equipoise.layers.interface import ATTENTION, mixers_of
from equipoise.models import adapters, storage
from equipoise.models.families import ConversionError
from equipoise.models.generation import HybridGeneration
from equipoise.models.hub import push
from equipoise.models.surgery import attach, config_as, hybridize


class HybridModel(HybridGeneration):
    """What all ``Equipoise…ForCausalLM`` classes add to the donor's class: loading, saving, generation."""

    _keep_in_fp32_modules_strict = {"hybrid"}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Load a full or delta checkpoint, local or from the Hub; keywords as in transformers.

        Raises:
            CheckpointError: files missing, damaged, or made for another donor.
        """
        hub = {k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only") if k in kwargs}
        if config is None:
            config_class: Any = cls.config_class
            config = config_class.from_pretrained(pretrained_model_name_or_path, **hub)
        described = config.equipoise or {}
        if described.get("checkpoint") == "delta":
            loaded = cls._load_delta(pretrained_model_name_or_path, config, hub, *args, **kwargs)
        else:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        if described.get("lora"):
            model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info
            adapters.load_lora(model, storage.lora_folder(pretrained_model_name_or_path, hub))
        return loaded

    @classmethod
    def _load_delta(cls, path: Any, config: Any, hub: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        described = config.equipoise
        donor, revision = storage.resolve_donor(path, described.get("donor"))
        donor_config_class, donor_class = donor_classes_of(config.model_type)
        # The delta's own settings count, not the donor's: they may have been changed for the conversion.
        donor_config = config_as(config, donor_config_class)
        donor_config._attn_implementation = getattr(config, "equipoise_donor_attention", None)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("revision", "subfolder")}
        loaded = donor_class.from_pretrained(
            donor, *args, config=donor_config, revision=revision or "main", **kwargs
        )
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        hybridize(model, parse(HybridConfig, described["hybrid"]), check=False)
        storage.load_mixers(model, path, hub)
        model.config.equipoise = dict(described)
        model.config.name_or_path = str(path)
        storage.load_generation_config(model, path, hub)
        model.eval()
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, delta: bool = False, **kwargs: Any) -> None:
        """Save the model: full weights, or (``delta``) only what conversion added, a few MB beside the donor.

        Adapters stay apart in ``lora/`` either way, so the donor can still be run from the checkpoint.

        Raises:
            ConversionError: a delta of a model whose donor is not known, or whose adapters are merged.
        """
        if not kwargs.get("is_main_process", True):
            return
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        lora = adapters.has_adapters(self)
        described = dict(self.config.equipoise or {}, checkpoint="delta" if delta else "full", lora=lora)
        if delta and (described.get("donor") is None or described.get("merged")):
            raise ConversionError(
                "a delta checkpoint names the donor it belongs to, and needs its weights unchanged: set the "
                "donor with record_donor(model, name_or_path) and do not merge adapters, or save with "
                "delta=False."
            )
        if delta and kwargs.get("push_to_hub"):
            raise ConversionError(
                "push_to_hub=True uploads full checkpoints: use push_to_hub(…, delta=True)."
            )
        self.config.equipoise = described
        if lora:
            adapters.save_lora(self, directory / adapters.FOLDER)
        base = adapters.base_state_dict(self, kwargs.get("state_dict"))
        if not delta:
            kwargs["state_dict"] = base
            super().save_pretrained(directory, *args, **kwargs)
            return
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(directory)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(directory)
        weights = {name: tensor.contiguous() for name, tensor in base.items() if ".hybrid." in name}
        write_atomically(directory / storage.MIXERS, lambda p: save_file(weights, p))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        delta: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **saving: Any,
    ) -> str:
        """Upload the model, full or as a ``delta``, and a card where the repository has none.

        The rest as in transformers; ``saving`` goes to `save_pretrained`. Returns the commit's address.

        Raises:
            ConversionError: a delta of a donor that is not on the Hub; nothing is uploaded then.
        """
        return push(
            self, repo_id, delta=delta, commit_message=commit_message, private=private, token=token,
            commit_description=commit_description, revision=revision, create_pr=create_pr, **saving,
        )  # fmt: skip

    def initialize_weights(self) -> None:
        """Mixers know how to initialise themselves; the donor's rule would fill them with its own noise."""
        for mixer in mixers_of(self):
            parameters = list(mixer.parameters())
            if parameters and not all(getattr(p, "_is_hf_initialized", False) for p in parameters):
                mixer.reset_parameters()
            for parameter in parameters:
                parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        super().initialize_weights()


@functools.cache
def classes_of(donor_type: str) -> tuple[type[Any], type[Any]]:
    """(configuration class, model class) for hybrids of a donor type, made and registered on first use."""
    module = sys.modules[__name__]
    donor_config: Any = CONFIG_MAPPING[donor_type]
    donor_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[donor_config]
    config_class = type(
        "Equipoise" + donor_config.__name__,
        (donor_config,),
        {
            "model_type": PREFIX + donor_type,
            "__module__": __name__,
            "__doc__": f"Configuration of a {donor_type} model converted by equipoise.",
            "__annotations__": {"equipoise": dict | None},
            "equipoise": None,
        },
    )

    def initialise(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        described = config.equipoise
        if described is None:
            raise ConversionError(
                f"{PREFIX}{donor_type}: the configuration does not say how to convert (no 'equipoise' "
                "entry); make models of this class with hybridize() or from_pretrained()."
            )
        config._attn_implementation = ATTENTION
        super(model_class, self).__init__(config, *args, **kwargs)  # type: ignore[misc]
        attach(self, parse(HybridConfig, described["hybrid"]))
        self.post_init()

    model_class = type(
        "Equipoise" + donor_class.__name__,
        (HybridModel, donor_class),
        {
            "config_class": config_class,
            "__init__": initialise,
            "__module__": __name__,
            "__doc__": f"A {donor_type} model converted by equipoise.",
        },
    )
    for made in (config_class, model_class):
        setattr(module, made.__name__, made)
        # `transformers serve` looks classes up by name there; importing may replace the module object
        setattr(sys.modules["transformers"], made.__name__, made)
    AutoConfig.register(PREFIX + donor_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    # How names and tensors differ on disk: mixtures of experts are fused on loading, heads are renamed.
    # transformers looks such rules up by the class's name first, then by the model's type.
    for known, own in ((donor_type, PREFIX + donor_type), (donor_class.__name__, model_class.__name__)):
        mapping: Any = get_checkpoint_conversion_mapping(known)
        if mapping is not None:
            register_checkpoint_conversion_mapping(own, mapping, overwrite=True)
    return config_class, model_class


def donor_classes_of(model_type: str) -> tuple[type[Any], type[Any]]:
    """(configuration class, model class) of the donor behind an ``equipoise_<type>``.

    Raises:
        ConversionError: not such a type.
    """
    if not model_type.startswith(PREFIX):
        raise ConversionError(f"expected a converted model, got model type {model_type!r}.")
    config: Any = CONFIG_MAPPING[model_type.removeprefix(PREFIX)]
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config]
    return config, model


def record_donor(model: nn.Module, name_or_path: str) -> None:
    """Note in the model's configuration where its donor comes from, so that deltas can be saved."""
    config: Any = model.config
    config.equipoise = dict(config.equipoise, donor=storage.describe_donor(name_or_path, config))


def merge_adapters(model: nn.Module) -> None:
    """Fold the LoRA adapters into the weights: faster, but the donor cannot be run from the model then."""
    adapters.unload_lora(model, merge=True)
    config: Any = model.config
    config.equipoise = dict(config.equipoise, merged=True, lora=False)


def read_description(directory: Path) -> dict[str, Any]:
    """The ``equipoise`` entry of a local checkpoint's config.json; empty where there is none."""
    path = directory / "config.json"
    return json.loads(path.read_text()).get("equipoise") or {} if path.is_file() else {}
