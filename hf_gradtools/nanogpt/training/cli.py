"""`hf-gradtools nanogpt train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from hf_gradtools.nanogpt.training.options import TrainOptions
from hf_gradtools.workflow.terminal import one_line_errors, quiet


def main(argv: list[str] | None = None) -> None:
    """Trains as the command line says, and tells of each evaluation.

    Args:
        argv (`list[str]`, *optional*): the words after the command; default `sys.argv`'s.
    """
    try:
        with one_line_errors(TrainOptions):
            quiet()
            from hf_gradtools.core.distributed import rank
            from hf_gradtools.nanogpt.training.run import run_flags, train_parser
            from hf_gradtools.workflow.flags import given_flags

            flags = given_flags(train_parser(), argv)
            result = run_flags({**_read(flags.pop("config", None)), **flags}, echo=typer.echo)
            if rank() > 0:
                return
            typer.echo(
                f"{result.out_dir}: best val loss {result.best_val_loss:.4f} at iteration {result.best_val_iter}, "
                f"{result.num_params:,} parameters"
                + (f", {result.iter_latency_ms:.1f} ms an iteration" if result.iter_latency_ms else "")
            )
    except typer.Exit as ended:  # outside of a typer app nothing else would catch it
        raise SystemExit(ended.exit_code) from ended
    except KeyboardInterrupt:
        typer.secho("\nInterrupted. The same command with --init_from resume continues it.", fg="red", err=True)
        raise SystemExit(130) from None


def _read(path: str | None) -> dict[str, Any]:
    """The flags of a YAML or JSON file."""
    if path is None:
        return {}
    import yaml

    try:
        flags = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(flags, dict):
        raise ValueError(f"--config {path} holds no mapping of flags to values, but {flags!r:.60}.")
    return flags


if __name__ == "__main__":
    main()
