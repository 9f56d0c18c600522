"""What importing the package registers with the stack, at no cost until the stack itself is imported.

`import hf_gradtools` loads neither torch nor transformers nor PEFT. A finder on `sys.meta_path` waits for each module
below, and runs the registration right after it; if the module is there already, it runs at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


# Model type: our package, its configuration, and its model in each of transformers' mappings.
AUTO_CLASSES = {
    "gradmemgpt": (
        "hf_gradtools.gradmem",
        "GradMemConfig",
        {"MODEL_FOR_CAUSAL_LM_MAPPING": "GradMemGPTForCausalLM"},
    ),
    "gradmem_rmt": ("hf_gradtools.gradmem", "RMTConfig", {"MODEL_FOR_CAUSAL_LM_MAPPING": "RMTForCausalLM"}),
    "hallucination_detector": (
        "hf_gradtools.ghosttrack",
        "DetectorConfig",
        {"MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": "HallucinationDetector"},
    ),
    "nanogpt": (
        "hf_gradtools.nanogpt",
        "NanoGPTConfig",
        {"MODEL_MAPPING": "NanoGPTModel", "MODEL_FOR_CAUSAL_LM_MAPPING": "NanoGPTForCausalLM"},
    ),
}


# Task: our pipeline, the Auto class of the models that it takes, and what goes in.
PIPELINES = {
    "hallucination-detection": (
        "hf_gradtools.ghosttrack.detection.pipeline.HallucinationDetectionPipeline",
        "AutoModelForSequenceClassification",
        "text",
    ),
}


def _register_tuner(peft: ModuleType) -> None:
    if "hf_gradtools.grit" not in sys.modules:  # else it is what imports PEFT, and registers at its end
        import_module("hf_gradtools.grit")


def _register_configs(auto: ModuleType) -> None:
    """Enters our configurations in transformers' own lazy mapping, to be imported when one is asked for.

    `AutoConfig.register` wants the class itself, and importing models here would run into transformers' own imports,
    of which this one is often a part. Hence what the mapping keeps for transformers' models.
    """
    for model_type, (package, config, _) in AUTO_CLASSES.items():
        auto.CONFIG_MAPPING_NAMES[model_type] = config
        auto.CONFIG_MAPPING._modules[model_type] = import_module(package)


def _register_models(auto: ModuleType) -> None:
    for model_type, (package, config, models) in AUTO_CLASSES.items():
        for mapping_name, model in models.items():
            mapping = getattr(auto, mapping_name)
            mapping._model_mapping[model_type] = model
            mapping._reverse_config_mapping[config] = model_type
            mapping._modules[model_type] = import_module(package)


def _register_pipelines(pipelines: ModuleType) -> None:
    """As transformers lists its own tasks: by the name of the class, to be imported when one is made."""
    for task, (pipeline, auto_class, kind) in PIPELINES.items():
        pipelines.SUPPORTED_TASKS[task] = {
            "impl": pipeline, "pt": (getattr(pipelines, auto_class),), "type": kind,
        }  # fmt: skip


AFTER: dict[str, Callable[[ModuleType], None]] = {
    "peft": _register_tuner,
    "transformers.models.auto.configuration_auto": _register_configs,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.pipelines": _register_pipelines,
}


def install() -> None:
    """Registers with what is imported already, and waits for the rest."""
    for name, registration in AFTER.items():
        if name in sys.modules:
            registration(sys.modules[name])
        else:
            sys.meta_path.insert(0, _Finder(name, registration))


class _Finder(MetaPathFinder):
    """Finds one module as Python would, with a loader that runs a registration afterwards."""

    def __init__(self, name: str, registration: Callable[[ModuleType], None]):
        self.name, self.registration = name, registration

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(self, spec.loader)  # loaded or not: some only ask whether it is installed
                return spec
        return None


class _Loader(Loader):
    def __init__(self, finder: _Finder, loader: Loader):
        self.finder, self.loader = finder, loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path.remove(self.finder)
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader  # as if we had never been there
        self.loader.exec_module(module)
        self.finder.registration(module)
