"""Flags of dataclasses: negative forms, lists, what was typed and what was not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from hf_gradtools.workflow.flags import given_flags, parser_for


@dataclass
class Options:
    """Options.

    Args:
        max_iters (`int`, defaults to 5): steps of
            the optimizer, 100%.
        on, off: two switches.

    Raises:
        ValueError: never.
    """

    max_iters: int = 5
    on: bool = True
    off: bool = field(default=False, metadata={"group": "switches"})
    unset: bool | None = None
    kind: Literal["a", "b"] = "a"
    names: list[str] = field(default_factory=lambda: ["x"])
    variant: str | list[str] = "mlp"
    heads: int | list[int] | None = None
    cap: int | float = 1
    extra: dict[str, Any] | None = None
    device_name: str | None = None
    windows: int | list[int | None] | None = None
    shifts: list[float] = field(default_factory=list)


def parse(*words):
    return parser_for(Options, prog="try").parse_args_into_dataclasses(list(words))[0]


def test_nothing_typed_gives_the_defaults_of_the_dataclass():
    assert parse() == Options()


@pytest.mark.parametrize("name", ["on", "off", "unset"])
def test_every_bool_has_all_its_forms(name):
    assert getattr(parse(f"--{name}"), name) is True
    assert getattr(parse(f"--{name}", "false"), name) is False
    assert getattr(parse(f"--{name}", f"--no-{name}"), name) is False
    assert getattr(parse(f"--no_{name}"), name) is False


def test_values_keep_the_types_of_their_fields():
    parsed = parse(
        "--max-iters", "7", "--kind", "b", "--names", "p", "q", "--variant", "mlp", "swiglu", "--heads", "4", "2",
        "--cap", "0.5", "--extra", '{"a": [1]}', "--device_name", "cpu",
    )  # fmt: skip
    assert parsed == Options(
        7, kind="b", names=["p", "q"], variant=["mlp", "swiglu"], heads=[4, 2], cap=0.5, extra={"a": [1]},
        device_name="cpu",
    )  # fmt: skip
    assert parse("--variant", "kan").variant == "kan"
    assert parse("--cap", "2").cap == 2


def test_words_that_are_none_and_numbers_that_look_like_flags():
    parsed = parse("--windows", "8", "null", "NONE", "--shifts", "-1e-3", "2", "-.5")
    assert (parsed.windows, parsed.shifts) == ([8, None, None], [-1e-3, 2.0, -0.5])


def test_given_flags_hold_only_what_was_typed():
    parser = parser_for(Options)
    assert given_flags(parser, []) == {}
    assert given_flags(parser, ["--no-on", "--max_iters", "5"]) == {"on": False, "max_iters": 5}


def test_help_comes_from_the_docstring_and_groups_from_the_metadata():
    text = " ".join(parser_for(Options).format_help().split())
    assert "steps of the optimizer, 100%." in text
    assert "two switches." in text
    assert "switches:" in parser_for(Options).format_help()
    assert "--off, --no-off two switches. (default: False)" in text
    assert "--heads X [X ...]" in text


def test_wrong_words_stop_with_the_flag_s_name(capsys):
    for words in (["--heads", "two"], ["--kind", "c"], ["--max_iter", "3"], ["--extra", "{"]):
        with pytest.raises(SystemExit):
            parser_for(Options).parse_args(words)
        error = capsys.readouterr().err
        assert words[0] in error
        assert len(error.splitlines()) == 1
        assert words[0] != "--max_iter" or "Did you mean --max_iters" in error


def test_the_dataclass_itself_stays_as_it_was():
    before = {name: known.type for name, known in Options.__dataclass_fields__.items()}
    parser_for(Options, skip=["kind"])
    assert before == {name: known.type for name, known in Options.__dataclass_fields__.items()}


def test_skipped_fields_have_no_flag():
    assert "--kind" not in parser_for(Options, skip=["kind"]).format_help()
