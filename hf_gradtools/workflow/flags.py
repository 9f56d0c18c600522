"""Flags made of dataclasses, in the seed's spelling: `--max_iters 9`, `--no-compile`, `--mlp_variant mlp swiglu`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import inspect
import json
import re
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool


__all__ = ["given_flags", "parser_for"]

ENTRY = re.compile(r"^(?P<indent> *)(?P<names>\w+(?:, *\w+)*)(?: *\((?P<type>.*)\))?: *(?P<text>.*)$")
SECTION = re.compile(r"^ *(Args|Arguments|Attributes|Parameters|Returns|Raises|Example|Examples|Source|Note):")
NUMBER = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
NONE = ("none", "null")
UNGIVEN = object()


def parser_for(
    *dataclass_types: type, prog: str | None = None, description: str | None = None, skip: Sequence[str] = ()
) -> HfArgumentParser:
    """A parser with one flag per field of dataclasses, also spelled with hyphens.

    Every bool takes a value (`--compile false`) or none, and has a negative form (`--no-compile`, `--no_compile`). A
    field that is one value or a list of them takes several (`--mlp_variant mlp swiglu`); one that is a mapping takes
    JSON. What a flag does is told by its field's `metadata["help"]`, else by the entry of that name in the `Args:` of
    the class; it stands under the heading `metadata["group"]`, else `_argument_group_name` of the class.

    Args:
        *dataclass_types (`type`): the dataclasses; no two of them may share a field's name.
        prog (`str`, *optional*): the command, in the usage line.
        description (`str`, *optional*): what the command does.
        skip (`Sequence[str]`, defaults to none): fields without a flag.

    Returns:
        `HfArgumentParser`: `parse_args_into_dataclasses(argv)` makes the dataclasses, [`given_flags`] only what was
        typed.
    """
    parser = _FlagParser(
        prog=prog,
        description=description,
        usage="%(prog)s [--flag value ...]",
        formatter_class=_OneSpelling,
        allow_abbrev=False,
    )
    parser.dataclass_types = list(dataclass_types)
    parser._negative_number_matcher = NUMBER  # argparse's own takes -1e-3 for a flag
    groups: dict[str, Any] = {}
    for dataclass_type in dataclass_types:
        types, texts = get_type_hints(dataclass_type), _documented(dataclass_type)
        for field in dataclasses.fields(dataclass_type):
            if not field.init or field.name in skip:
                continue
            field = copy.copy(field)  # HfArgumentParser writes on the class's own
            metadata = {"help": texts.get(field.name), **field.metadata}
            heading = metadata.pop("group", getattr(dataclass_type, "_argument_group_name", None))
            if heading is not None and heading not in groups:
                groups[heading] = parser.add_argument_group(heading)
            field.type, field.metadata = types[field.name], metadata
            _add_flag(parser if heading is None else groups[heading], field)
    return parser


def given_flags(parser: HfArgumentParser, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """What a command line says, without the defaults of what it does not mention.

    Args:
        parser (`HfArgumentParser`): of [`parser_for`].
        argv (`Sequence[str]`, *optional*): the words after the command; default `sys.argv`'s.

    Returns:
        `dict[str, Any]`: values by field.
    """
    namespace = Namespace(**{action.dest: UNGIVEN for action in parser._actions if action.dest != "help"})
    parsed = parser.parse_args(argv, namespace)  # sets a default only where nothing stands yet
    return {name: value for name, value in vars(parsed).items() if value is not UNGIVEN}


class _FlagParser(HfArgumentParser):
    """Says what is wrong in one line, and what may have been meant: the usage of so many flags hides it.

    Attributes:
        raises: whether to raise ValueError instead of ending the process.
    """

    raises = False

    def error(self, message: str) -> NoReturn:
        words = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else []
        close = difflib.get_close_matches(words[0], self._option_string_actions, 2) if words else []
        hint = f"Did you mean {' or '.join(close)}?" if close else "See --help."
        if self.raises:
            raise ValueError(f"{message}. {hint}")
        self.exit(2, f"{self.prog}: error: {message}. {hint}\n")
        raise AssertionError("exit returned")


class _OneSpelling(ArgumentDefaultsHelpFormatter):
    """Shows `--some_flag X` and `--some_switch, --no-some_switch`, though hyphens do as well."""

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings or action.dest == "help":
            return super()._format_action_invocation(action)
        name = action.option_strings[0]
        if action.nargs == "?":
            return f"{name}, --no-{name.removeprefix('--')}"
        return f"{name} {self._format_args(action, 'X')}"

    def _get_help_string(self, action: Action) -> str:
        if action.default is None:
            return action.help or ""
        return (super()._get_help_string(action) or "").replace("%(default)s", "%(default)r")


class _OneOrSeveral(Action):
    """Keeps a single value as it is, several as a list."""

    def __call__(self, parser: Any, namespace: Namespace, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def _add_flag(parser: Any, field: dataclasses.Field[Any]) -> None:
    members = [member for member in _members(field.type) if member is not NoneType]
    lists = [member for member in members if get_origin(member) is list or member is list]
    scalars = [member for member in members if member not in lists]
    if bool in scalars and len(scalars) == 1 and not lists:
        _add_bool(parser, field)
    elif any((get_origin(member) or member) is dict for member in members):
        _add(parser, field, type=_json)
    elif lists and scalars:
        takes_none = any(NoneType in _members(item) for member in lists for item in get_args(member))
        _add(parser, field, type=_reader(scalars, takes_none), nargs="+", action=_OneOrSeveral)
    elif len(scalars) > 1:
        _add(parser, field, type=_reader(scalars))
    elif members == [int]:
        _add(parser, field, type=_whole)
    else:
        HfArgumentParser._parse_dataclass_field(parser, field)


def _add_bool(parser: Any, field: dataclasses.Field[Any]) -> None:
    _add(parser, field, type=string_to_bool, nargs="?", const=True)
    negative = [f"--no{joint}{spelling[2:]}" for spelling in _spellings(field) for joint in "_-"]
    parser.add_argument(
        *negative,
        action="store_false",
        dest=field.name,
        default=_default(field),
        help=SUPPRESS,  # told beside the positive form
    )


def _add(parser: Any, field: dataclasses.Field[Any], **options: Any) -> None:
    default = _default(field)
    required = {"required": True} if default is dataclasses.MISSING else {"default": default}
    metadata = {name: value for name, value in field.metadata.items() if name != "aliases"}
    parser.add_argument(*_spellings(field), dest=field.name, **{**metadata, **required, **options})


def _spellings(field: dataclasses.Field[Any]) -> list[str]:
    """`--a_b`, `--a-b`, and the aliases."""
    names = [f"--{field.name}", *field.metadata.get("aliases", [])]
    return list(dict.fromkeys(spelling for name in names for spelling in (name, _hyphens(name))))


def _hyphens(spelling: str) -> str:
    return "--" + spelling[2:].replace("_", "-")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _members(kind: Any) -> tuple[Any, ...]:
    """The members of a union; anything else is its own only one."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _reader(scalars: Sequence[Any], takes_none: bool = False) -> Callable[[str], Any]:
    """Reads a word as the first of several types that takes it; perhaps `none` and `null` as None."""
    readers = [_choice(kind) if get_origin(kind) is Literal else _READERS.get(kind, kind) for kind in scalars]
    readers.sort(key=lambda reader: reader is str)  # a text takes every word

    def read(word: str) -> Any:
        if takes_none and word.lower() in NONE:
            return None
        for reader in readers:
            try:
                return reader(word)
            except (ValueError, ArgumentTypeError):
                continue
        raise ArgumentTypeError(f"{word!r} is none of {', '.join(getattr(k, '__name__', str(k)) for k in scalars)}")

    return read


def _choice(kind: Any) -> Callable[[str], Any]:
    choices = {str(choice): choice for choice in get_args(kind)}

    def read(word: str) -> Any:
        if word not in choices:
            raise ArgumentTypeError(f"{word!r} is none of {', '.join(choices)}")
        return choices[word]

    return read


def _json(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError as error:
        raise ArgumentTypeError(f"{word!r} is no JSON: {error}") from error


def _whole(word: str) -> int:
    """Reads `2000`, and what a file's `2e3` or a range's `2000.0` is written as."""
    for reader in (int, float):
        with contextlib.suppress(ValueError):
            if (number := reader(word)) == number // 1:
                return int(number)
    raise ArgumentTypeError(f"{word!r} is no whole number")


_READERS: dict[Any, Callable[[str], Any]] = {bool: string_to_bool, int: _whole}


def _documented(dataclass_type: type) -> dict[str, str]:
    """What the `Args:` of a class and of its ancestors say of each field, percent signs doubled for argparse."""
    texts: dict[str, str] = {}
    for ancestor in reversed(dataclass_type.__mro__):
        if dataclasses.is_dataclass(ancestor) and ancestor.__doc__:
            texts.update(_entries(inspect.cleandoc(ancestor.__doc__)))
    return {name: text.replace("%", "%%") for name, text in texts.items()}


def _entries(docstring: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    inside, indent, names = False, None, []
    for line in docstring.splitlines():
        if section := SECTION.match(line):
            inside, indent, names = section[1] in ("Args", "Arguments", "Attributes", "Parameters"), None, []
            continue
        entry = ENTRY.match(line) if inside else None
        if entry and (indent is None or len(entry["indent"]) == indent):
            indent, names = len(entry["indent"]), re.split(", *", entry["names"])
            texts.update(dict.fromkeys(names, entry["text"]))
        elif inside and names and line.strip():
            texts.update({name: f"{texts[name]} {line.strip()}".strip() for name in names})
    return texts
