"""`hf-gradtools nanogpt hardware`: the report of a configuration, or of several beside each other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import typer
import yaml
from transformers import AutoConfig
from transformers.utils import CONFIG_NAME

from hf_gradtools.core.atomic import write_json_atomically
from hf_gradtools.hub import is_hub_id
from hf_gradtools.nanogpt.configuration_nanogpt import NanoGPTConfig
from hf_gradtools.nanogpt.costs import KINDS_OF_OPS, Ops
from hf_gradtools.nanogpt.hardware import HardwareReport, compare, hardware_report
from hf_gradtools.nanogpt.training.run import ModelFlags, config_of_flags
from hf_gradtools.workflow.flags import given_flags, parser_for


@dataclass
class HardwareOptions:
    """What to report on.

    Args:
        compare: configurations to put beside each other, instead of the one that the other flags describe: folders
            of models, Hub ids, or .yaml and .json files of flags.
        context: tokens of context; default the model's block_size.
        bytes_per_number: size of a number in the cache, 2 for bfloat16.
        json_file: file to write the whole report to.
    """

    compare: list[str] | None = None
    context: int | None = None
    bytes_per_number: int = 2
    json_file: str | None = None


def main(argv: list[str] | None = None) -> None:
    """Prints the report."""
    parser = parser_for(
        HardwareOptions,
        ModelFlags,
        prog="hf-gradtools nanogpt hardware",
        description="Counts parameters, operations and state of a configuration, without training it.",
    )
    given = given_flags(parser, argv)
    options = HardwareOptions(**{f.name: given.pop(f.name) for f in fields(HardwareOptions) if f.name in given})
    configs = {"this": NanoGPTConfig(**given)}
    if options.compare:
        if given:
            raise ValueError(
                f"--compare takes whole configurations; leave out {', '.join(f'--{name}' for name in given)}."
            )
        configs = {name: load_config(name) for name in options.compare}
    reports = {
        name: hardware_report(config, options.context, options.bytes_per_number) for name, config in configs.items()
    }
    if options.json_file:
        write_json_atomically(Path(options.json_file), {name: report.as_dict() for name, report in reports.items()})
    typer.echo(comparison_table(reports) if len(reports) > 1 else report_table(*reports.values()))


def load_config(name: str) -> NanoGPTConfig:
    """The configuration in a folder, on the Hub, or in a file of flags as `train` takes.

    Raises:
        ValueError: the name leads nowhere, the model is another, or the file is no mapping of flags.
    """
    path = Path(name)
    if not path.exists() and not is_hub_id(name):
        raise ValueError(f"--compare {name}: there is no such file or folder, and it is no Hub id.")
    if path.suffix not in (".yaml", ".yml", ".json"):
        if path.is_dir() and not (path / CONFIG_NAME).is_file():
            raise ValueError(f"--compare {name}: the folder holds no {CONFIG_NAME}.")
        config = AutoConfig.from_pretrained(name)
        if not isinstance(config, NanoGPTConfig):
            raise ValueError(f"--compare {name}: a {config.model_type} model, whose parts nobody counted.")
        return config
    text = path.read_text(encoding="utf-8")
    flags = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(flags, Mapping):
        raise ValueError(f"--compare {name}: it holds {type(flags).__name__}, not a mapping of flags like n_layer: 6.")
    return config_of_flags(flags)


def report_table(report: HardwareReport) -> str:
    """The report as text: one row per part and phase, one column per kind of operation."""
    lines = [
        f"parameters  {report.params:,}",
        f"state       {report.state_bytes:,} bytes after {report.context:,} tokens",
    ]
    for phase, parts, total in (
        (f"decode, token {report.context:,}", report.decode, report.decode_total),
        (f"prefill, {report.context:,} tokens", report.prefill, report.prefill_total),
    ):
        kinds = [kind for kind in KINDS_OF_OPS if getattr(total, kind)]
        rows = [[part, *_counts(ops, kinds)] for part, ops in {**parts, "total": total}.items()]
        lines += ["", *_table([[phase, *kinds], *rows])]
    return "\n".join(lines)


def _counts(ops: Ops, kinds: Sequence[str]) -> list[str]:
    return [f"{getattr(ops, kind):,}" for kind in kinds]


def comparison_table(reports: Mapping[str, HardwareReport]) -> str:
    """Several reports side by side; after the first, with the ratio to it."""
    names = list(reports)
    rows = [["", *names]]
    for row in compare(reports):
        rows.append([row["figure"], *(_with_ratio(row[name], row[names[0]], name == names[0]) for name in names)])
    return "\n".join(_table(rows))


def _with_ratio(value: int, first: int, is_first: bool) -> str:
    return f"{value:,}" if is_first or not first else f"{value:,} ({value / first:.2f}x)"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    first, *others = (max(len(cell) for cell in column) for column in zip(*rows, strict=True))
    layout = "  ".join([f"{{:<{first}}}", *(f"{{:>{width}}}" for width in others)])
    return [layout.format(*row) for row in rows]
