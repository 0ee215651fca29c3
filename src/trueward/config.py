"""Configurations from YAML and the command line: YAML sets defaults, the command line wins."""

import contextlib
import dataclasses
import difflib
import io
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from trueward.data.sources import DataError

T = TypeVar("T")


def parse(config_class: type[T], arguments: Sequence[str], *, command: str) -> T:
    """Build a configuration from `--config FILE.yaml` and `--any.field value` arguments.

    A file may hold variants of itself under `settings:`; `--setting NAME` lays one over the rest.

    Raises:
        DataError: The YAML file is missing or broken, or has an unknown key or a value of the
            wrong type; the message names file, line and the nearest known key.
    """
    rest = list(arguments)
    files, settings = _take(rest, "--config"), _take(rest, "--setting")
    if settings and not files:
        raise DataError("--setting names a part of a --config file: give that file too.")
    from_yaml = [
        a for file in files for a in yaml_arguments(config_class, Path(file), settings=settings)
    ]
    given = [*from_yaml, *rest]
    named = _named_parts(config_class, given)
    if files:
        _refuse_new_parts(named, _named_parts(config_class, from_yaml))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                config_class,
                prog=f"trueward {command}",
                args=given,
                config=(tyro.conf.FlagConversionOff,),
                default=config_class(**named) if named else tyro.MISSING_NONPROP,
            )
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            raise
        raise DataError(f"{_sentence(printed.getvalue())} (trueward {command} --help)") from stop


def _named_parts(config_class: type, arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return, for each field that is a dict of dataclasses, the parts that arguments name.

    The argument parser knows the options of such parts only once they stand in the default.
    """
    found = {}
    for name, wanted in get_type_hints(config_class).items():
        part = _part_class(wanted)
        if part is None:
            continue
        prefix = f"--{name}."
        keys = [a[len(prefix) :].split(".")[0] for a in arguments if a.startswith(prefix)]
        if not keys and {"-h", "--help"} & set(arguments):
            keys = ["NAME"]  # shows what a part has
        found[name] = {key: part() for key in dict.fromkeys(keys)}
    return found


def _refuse_new_parts(
    named: Mapping[str, Mapping[str, Any]], in_file: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuse a name that the file lacks: on the command line beside a file it is a slip."""
    for field, parts in named.items():
        for name in parts:
            if name not in in_file[field] and in_file[field]:
                near = difflib.get_close_matches(name, in_file[field], n=1, cutoff=0.0)[0]
                raise DataError(
                    f"--{field}.{name}: the file has no '{name}' under '{field}'; the nearest that "
                    f"it has is '{near}'."
                )


def _part_class(wanted: Any) -> type | None:
    """Return D of `dict[str, D]` where D is a dataclass."""
    if get_origin(wanted) is not dict:
        return None
    part = get_args(wanted)[1]
    return part if dataclasses.is_dataclass(part) and isinstance(part, type) else None


def _sentence(box: str) -> str:
    """Return what the argument parser's box says, as one sentence without frame and title."""
    rows = [line.strip("│╭╮╰╯─ \t") for line in box.splitlines()[1:]]
    helps = next((i for i, row in enumerate(rows) if "full helptext" in row), len(rows))
    return " ".join(row for row in rows[:helps] if row).rstrip(".") + "."


def _take(arguments: list[str], option: str) -> list[str]:
    """Remove an option and its value wherever they stand in the list; return the values."""
    values: list[str] = []
    while True:
        at = next((i for i, a in enumerate(arguments) if a.partition("=")[0] == option), None)
        if at is None:
            return values
        _, equals, value = arguments.pop(at).partition("=")
        if not equals:
            if at >= len(arguments):
                raise DataError(f"{option} needs a value after it.")
            value = arguments.pop(at)
        values.append(value)


def yaml_arguments(config_class: type, path: Path, *, settings: Sequence[str] = ()) -> list[str]:
    """Return a YAML file's values as command-line arguments, after checking every key."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise DataError(f"The configuration {path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise DataError(f"{where} is no valid YAML: {problem}.") from error
    if root is None:
        return []
    variants = _pop_settings(root)
    arguments = list(_arguments(config_class, root, path, prefix=""))
    for name in variants:  # all are checked, the named ones are used
        laid_over = list(_arguments(config_class, variants[name], path, prefix=""))
        arguments += laid_over if name in settings else []
    for name in settings:
        if name not in variants:
            known = ", ".join(variants) or "none"
            raise DataError(f"{path} has no setting '{name}'; it has: {known}.")
    return arguments


def _pop_settings(root: yaml.Node) -> dict[str, yaml.Node]:
    """Take the `settings:` part out of a file's tree."""
    if not isinstance(root, yaml.MappingNode):
        return {}
    found = [pair for pair in root.value if pair[0].value == "settings"]
    root.value = [pair for pair in root.value if pair not in found]
    return {key.value: node for _, part in found for key, node in part.value}


def _arguments(config_class: type, node: yaml.Node, path: Path, *, prefix: str) -> Iterator[str]:
    where = f"{path}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        inside = f"'{prefix.rstrip('.')}'" if prefix else "The file"
        raise DataError(f"{where}: {inside} must hold `key: value` lines.")
    hints = get_type_hints(config_class)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(config_class)}
    for key_node, value in node.value:
        key = str(key_node.value)
        line = f"{path}:{key_node.start_mark.line + 1}"
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
            raise DataError(
                f"{line}: unknown key '{prefix}{key}'; the nearest known one is "
                f"'{prefix}{near[0]}'."
            )
        wanted = fields[key]
        part = _part_class(wanted)
        if dataclasses.is_dataclass(wanted):
            yield from _arguments(wanted, value, path, prefix=f"{prefix}{key}.")  # type: ignore[arg-type]
        elif part is not None:
            yield from _part_arguments(part, value, path, prefix=f"{prefix}{key}")
        else:
            loaded = _construct(value)
            _require_type(loaded, wanted, line, f"{prefix}{key}")
            yield f"--{prefix}{key}"
            yield from _words(loaded)


def _part_arguments(part: type, node: yaml.Node, path: Path, *, prefix: str) -> Iterator[str]:
    """Return the arguments of a mapping from names to options; `NAME:` alone has the defaults."""
    if not isinstance(node, yaml.MappingNode):
        raise DataError(
            f"{path}:{node.start_mark.line + 1}: '{prefix}' must hold `name: options` lines."
        )
    for key_node, value in node.value:
        name = str(key_node.value)
        if not re.fullmatch(r"\w[\w-]*", name):
            raise DataError(
                f"{path}:{key_node.start_mark.line + 1}: '{name}' under '{prefix}' must be a name "
                "of letters, digits, - and _."
            )
        first = dataclasses.fields(part)[0]
        default = first.default if first.default is not dataclasses.MISSING else ""
        yield from (f"--{prefix}.{name}.{first.name}", str(default))  # the name itself is said
        if not (isinstance(value, yaml.ScalarNode) and value.value == ""):
            yield from _arguments(part, value, path, prefix=f"{prefix}.{name}.")


def _construct(node: yaml.Node) -> Any:
    return yaml.safe_load(yaml.serialize(node))


def _words(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield str(item)
    elif isinstance(value, list):
        yield from map(str, value)
    else:
        yield str(value)


def _require_type(value: object, wanted: Any, where: str, name: str) -> None:
    """Refuse a value that the field cannot hold, with the file and line."""
    if _fits(value, wanted):
        return
    raise DataError(f"{where}: '{name}' must be {_describe(wanted)}, got {value!r}.")


def _fits(value: object, wanted: Any) -> bool:
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return any(_fits(value, a) for a in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(v, arguments[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, arguments[1]) for v in value.values())
    if wanted is type(None):
        return value is None
    if wanted is bool:
        return isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if wanted is float:
        return _is_number(value)
    if wanted is str:
        return isinstance(value, str | int | float)
    return True


def _is_number(value: object) -> bool:
    if isinstance(value, bool):
        return False
    try:  # YAML 1.1 reads 1e-4 as text
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True


def _describe(wanted: Any) -> str:
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in arguments)
    if origin is list:
        return "a list"
    if origin is dict:
        return "`name: value` lines"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(wanted, "nothing" if wanted is type(None) else str(wanted))
