"""Load a recipe file and `section.key=value` overrides as a RunConfig.

All problems are reported at once, each with file, line, key, value, what is allowed and, for a
misspelt name, the nearest valid one.
"""

import difflib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from configs.errors import UserError
from configs.schema import RunConfig

Loc = tuple[str, ...]
"""Path of a key: `("train", "batch_size")`."""
Model = TypeVar("Model", bound=BaseModel)
# PyYAML raises ValueError for a tag that does not fit its value (`!!int x`), and RecursionError for a value that
# contains itself (`a: &x [*x]`).
_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads scalars as users expect: `1e-4` is a number; `0100`, `1:30` and dates are text."""


# PyYAML follows YAML 1.1, in which 0100 is 64, 1:30 is 90, and 1e-4 is text.
_REPLACED = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the recipe at `path` and apply `section.key=value` overrides.

    Raises UserError with one line for each problem.
    """
    values, where, problems = _read(path)
    for override in overrides:
        problems += _apply(override, values, where)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as e:
        problems += [line for error in e.errors() for line in _explain(error, path, where)]
    if problems:
        # Each member of a union reports the same value; dict.fromkeys keeps the first of equal lines.
        raise UserError("\n".join(dict.fromkeys(problems)))
    return config


def load_entries(path: Path, model_of: Callable[[dict[str, Any]], type[Model]]) -> dict[str, Model]:
    """The entries of the file at `path`, a mapping of names to sections; `model_of` gives the model of a section.

    Raises UserError with one line for each problem.
    """
    values, where, problems = _read(path, "the file must be a mapping of names to settings")
    entries = {}
    for name, value in values.items():
        below = {loc[1:]: line for loc, line in where.items() if loc[0] == str(name)}
        if not isinstance(value, dict):
            problems.append(
                f"{below.get((), path)}: {name} must be a mapping of settings, got a {_kind(value)}"
            )
            continue
        model = model_of(value)
        try:
            entries[str(name)] = model.model_validate(value)
        except ValidationError as e:
            for error in e.errors():
                problems += _explain(error, path, below, model, str(name))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return entries


def load_section(path: Path, model: type[Model]) -> Model:
    """The file at `path`, which is one section. Raises UserError with one line for each problem."""
    values, where, problems = _read(path, "the file must be a mapping of settings")
    try:
        section = model.model_validate(values)
    except ValidationError as e:
        problems += [line for error in e.errors() for line in _explain(error, path, where, model)]
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return section


def with_settings(entry: Model, settings: Sequence[str], option: str, owner: str) -> Model:
    """A copy of `entry` with each `key=value` of `settings`, which the command line's `option` gave.

    `owner` is the name of the entry in messages. Raises UserError.
    """
    values: dict[str, Any] = entry.model_dump()
    where: dict[Loc, str] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise UserError(f"{option} {setting}: a setting is key=value; keys: {', '.join(values)}")
        values[key] = _value(text)
        where[(key,)] = f"{option} {setting}"
    try:
        return type(entry).model_validate(values)
    except ValidationError as e:
        problems = [
            p for error in e.errors() for p in _explain(error, Path(option), where, type(entry), owner)
        ]
        raise UserError("\n".join(dict.fromkeys(problems))) from None


def nearest(name: str, valid: Sequence[str]) -> str:
    """`; did you mean "x"?` if a valid name is similar to `name`, else an empty string."""
    match = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f'; did you mean "{match[0]}"?' if match else ""


def _read(
    path: Path, what: str = "a recipe is a mapping of sections (model:, data:, …)"
) -> tuple[dict[str, Any], dict[Loc, str], list[str]]:
    """The values, the place of each key (`file:line`), and the problems of the YAML itself."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        parent = path.parent if path.parent.is_dir() else Path(".")
        there = sorted(str(p) for p in parent.glob("*.yaml"))
        hint = nearest(str(path), there) or (f"; there are: {', '.join(there)}" if there else "")
        raise UserError(f"{path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read: {e.strerror if isinstance(e, OSError) else e}") from None
    where: dict[Loc, str] = {}
    problems: list[str] = []
    try:
        # Nodes know their lines, and values do not: parse once, and use the same nodes for both.
        loader = _Loader(text)
        root = loader.get_single_node()
        _locate(root, (), path, where, problems)
        values = loader.construct_document(root) if root is not None else {}
    except _YAML_ERRORS as e:
        mark = getattr(e, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(e, "problem", None) or str(e).splitlines()[0]
        raise UserError(f"{path}{line}: not valid YAML: {reason}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}:1: {what}, got a {_kind(values)}")
    return values, where, problems


def _locate(node: Any, loc: Loc, path: Path, where: dict[Loc, str], problems: list[str]) -> None:
    """Record the line of every key below `node`, and report keys written twice, of which YAML keeps the last."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        here = (*loc, str(key.value))
        line = f"{path}:{key.start_mark.line + 1}"
        if here in where:
            problems.append(f"{line}: {'.'.join(here)} is written twice (first at {where[here]})")
        where[here] = line
        _locate(value, here, path, where, problems)


def _apply(override: str, values: dict[str, Any], where: dict[Loc, str]) -> list[str]:
    """Set one `section.key=value` in `values`; return the problems with it."""
    key, equals, text = override.partition("=")
    loc = tuple(key.split("."))
    if not equals or len(loc) < 2 or not all(loc):
        return [f"{override!r}: an override is section.key=value, such as train.batch_size=512"]
    section: Any = values
    for name in loc[:-1]:
        # An empty section, `train:` without keys, is null in YAML.
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            return [f"command line: {key}: {name} is not a section in the recipe"]
    section[loc[-1]] = _value(text)
    for i in range(1, len(loc) + 1):
        where[loc[:i]] = "command line"
    return []


def _value(text: str) -> Any:
    """The value after a `=`, read as YAML, or the text itself where that is not valid YAML."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except _YAML_ERRORS:
        return text


def _explain(
    error: ErrorDetails, path: Path, where: dict[Loc, str], root: type[BaseModel] = RunConfig, owner: str = ""
) -> list[str]:
    """The lines for one pydantic error, with the names of the user's file.

    `owner` is the name of the entry that `root` describes, or empty for a whole recipe.
    """
    # Pydantic's location also has the tags of unions and the indices of tuples: keep only the user's keys.
    loc = tuple(part for part in map(str, error["loc"]) if not part.startswith(("literal[", "constrained-")))
    model, known = _model_at(root, loc)
    while loc and loc not in where and not known:
        loc = loc[:-1]
        model, known = _model_at(root, loc)
    # A missing key has no line of its own: name the line of the nearest section around it.
    line = next((where[loc[:i]] for i in range(len(loc), -1, -1) if loc[:i] in where), str(path))
    key = ".".join((owner, *loc) if owner else loc)
    text = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and known and not _section(model, loc[-1]):  # a validator of one field
        return [f"{line}: {key} = {_show(error['input'])}: {text}"]
    if error["type"] == "value_error":  # a validator of a section, whose lines begin with their keys
        prefix = f"{owner}." if owner else ""
        return [f"{_line_of(problem, where, path)}: {prefix}{problem}" for problem in text.split("\n")]
    if error["type"] == "invalid_key":
        return [f"{line}: {_show(error['input'])} cannot be a key; keys are names, such as batch_size"]
    if error["type"] == "missing" and _section(model, loc[-1]):
        return [f"{line}: {key} is missing; a recipe needs this section"]
    if error["type"] == "missing" and known and error["loc"][-1] == loc[-1]:
        return [f"{line}: {key} is missing"]
    if error["type"] == "extra_forbidden":
        valid = list(model.model_fields)
        hint = nearest(loc[-1], valid)
        section = ".".join(loc[:-1]) or owner or "a recipe"
        return [f"{line}: {key}: unknown key{hint} ({section} has: {', '.join(valid)})"]
    return [f"{line}: {key} = {_show(error['input'])}: {_allowed(error, *_model_at(root, loc), loc[-1])}"]


def _line_of(problem: str, where: dict[Loc, str], path: Path) -> str:
    """The place of the key with which the text of a cross-section problem begins."""
    loc = tuple(problem.split()[0].split("."))
    return next((where[loc[:i]] for i in range(len(loc), 0, -1) if loc[:i] in where), str(path))


def _model_at(root: type[BaseModel], loc: Loc) -> tuple[type[BaseModel], bool]:
    """The section of `root` that holds the last part of `loc`, and whether that part is a field of it."""
    model = root
    for i, name in enumerate(loc):
        field = model.model_fields.get(name)
        if i == len(loc) - 1 or field is None:
            return model, field is not None and i == len(loc) - 1
        section = _section(model, name)
        if section is None:
            return model, False
        model = section
    return model, False


def _section(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section that the field `name` of `model` holds, if it holds one."""
    field = model.model_fields.get(name)
    annotations = (field.annotation, *get_args(field.annotation)) if field else ()
    return next((a for a in annotations if isinstance(a, type) and issubclass(a, BaseModel)), None)


def _allowed(error: ErrorDetails, model: type[BaseModel], known: bool, name: str) -> str:
    """The values that the field `name` of `model` accepts, in words."""
    kind, context = error["type"], error.get("ctx", {})
    field = model.model_fields[name] if known else None
    annotation = field.annotation if field else None
    section = _section(model, name)
    if section:
        fields = ", ".join(section.model_fields)
        return f"must be a mapping with keys among {fields}, got a {_kind(error['input'])}"
    choices = _choices(annotation)
    if choices:
        hint = nearest(str(error["input"]), [str(c) for c in choices])
        also = " or a whole number of at least 1" if _takes_number(annotation) else ""
        return f"allowed: {', '.join(map(str, choices))}{also}{hint}"
    bounds = {
        "greater_than_equal": f"must be at least {context.get('ge')}",
        "greater_than": f"must be above {context.get('gt')}",
        "less_than": f"must be below {context.get('lt')}",
        "less_than_equal": f"must be at most {context.get('le')}",
        "finite_number": "must be a finite number",
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "float_type": "must be a number",
        "bool_type": "must be true or false",
        "string_type": "must be text",
        "dict_type": "must be a mapping",
        "list_type": "must be a list",
    }
    if kind == "tuple_type" and Ellipsis in get_args(annotation):
        return "must be a list"
    if kind in ("tuple_type", "missing", "too_long"):
        return f"must be a list of {len(get_args(annotation))} numbers"
    return bounds.get(kind, error["msg"])


def _choices(annotation: Any) -> list[Any]:
    """The values of every Literal in a type annotation, however deep."""
    found: list[Any] = []
    for arg in get_args(annotation):
        found += [arg] if isinstance(arg, (str, int)) and not isinstance(arg, bool) else _choices(arg)
    return found


def _takes_number(annotation: Any) -> bool:
    return any(arg is int or _takes_number(arg) for arg in get_args(annotation))


def _kind(value: Any) -> str:
    """The type of a value in YAML's words, for messages."""
    names = {list: "list", dict: "mapping", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "number")


def _show(value: Any) -> str:
    """A value as the user would write it in YAML, at most 80 characters on one line."""
    if isinstance(value, str) and not value.isprintable():
        return json.dumps(value)[:80]
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()[:80]
