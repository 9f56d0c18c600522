"""What a resumed run needs beside adapter and optimizer: factors, bases, schedule. One safetensors file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save

from hf_gradtools.core.store import atomic_write


if TYPE_CHECKING:
    from hf_gradtools.grit.controller import GritController


STATE_FILE = "grit_state.safetensors"
COUNTERS = ("step", "last_refresh", "last_cut", "skipped_sums", "failed_inversions", "kept_energy")


def save_state(controller: GritController, folder: str | os.PathLike[str]) -> None:
    """Writes the controller's state to `folder`, whole or not at all."""
    tensors, layers = {}, {}
    for layer in controller.layers:
        fisher = controller.fishers[layer.name]
        tensors[f"{layer.name}/average"] = fisher.average.cpu().contiguous()
        if layer.name in controller.bases:
            tensors[f"{layer.name}/basis"] = controller.bases[layer.name].cpu().contiguous()
        layers[layer.name] = [fisher.weight, fisher.samples, controller.live_ranks[layer.name]]
    header = {name: getattr(controller, name) for name in COUNTERS}
    header |= {"layers": layers, "losses": list(controller.losses.losses), "config": _meaning(controller)}
    with atomic_write(Path(folder) / STATE_FILE) as file:
        file.write(save(tensors, {"grit": json.dumps(header)}))


def load_state(controller: GritController, folder: str | os.PathLike[str]) -> None:
    """Puts the controller where it was when the state was saved; its adapter and optimizer must be there already.

    Raises:
        ValueError: there is no state in the folder, or it is another adapter's.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"{str(folder)!r} holds no {STATE_FILE}, so its run was not GRIT's and cannot be continued as such. "
            "Resume from a checkpoint of a run with GritTrainer or GritCallback, or load its adapter and start anew."
        )
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["grit"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    for name, value in _meaning(controller).items():
        if header["config"][name] != value:
            raise ValueError(
                f"the run in {path.parent} has {name}={header['config'][name]!r}, not {value!r}. Resume with the "
                "GritConfig that it began with."
            )
    _check(controller, header["layers"], tensors, path)
    for layer in controller.layers:
        weight, samples, controller.live_ranks[layer.name] = header["layers"][layer.name]
        controller.fishers[layer.name].restore(tensors[f"{layer.name}/average"], weight, samples)
        if f"{layer.name}/basis" in tensors:
            controller.bases[layer.name] = tensors[f"{layer.name}/basis"].to(layer.A.device)
    for name in COUNTERS:
        setattr(controller, name, header[name])
    for loss in header["losses"]:
        controller.losses.observe(loss)
    controller.continue_from_state()


def _meaning(controller: GritController) -> dict[str, Any]:
    """The options without which the tensors mean something else."""
    return {name: getattr(controller.config, name) for name in ("preconditioner", "kfac_exponent", "statistics")}


def _check(controller: GritController, layers: dict[str, Any], tensors: dict[str, Any], path: Path) -> None:
    for layer in controller.layers:
        stored = tensors.get(f"{layer.name}/average")
        if stored is None or stored.shape[-1] != layer.rank:
            rank = "nothing" if stored is None else f"rank {stored.shape[-1]}"
            raise ValueError(
                f"{path} is another adapter's: it has {rank} for {layer.name}, whose rank is {layer.rank} here. "
                "Resume with the model and GritConfig that the run began with."
            )
    if strangers := sorted(set(layers) - {layer.name for layer in controller.layers}):
        raise ValueError(f"{path} is another adapter's: it knows {strangers[0]}, which this model has not.")
