"""Experiments as Python files that return a Fiddle config of plain callables.

An experiment file defines `experiment(...)`, whose arguments are its macros and whose result is a
`Config` of a stage or a pipeline of stages. From the shell, `--set name=value` fills a macro when
`experiment` has an argument of that name, and otherwise overrides one field of the result by its
dotted path (`pretrain.phases.0.steps=10`). A `Config` object that is used twice is shared: copy it
(`copy.deepcopy`) when that is not meant.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import fiddle as fdl
from fiddle import printing
from fiddle.experimental import serialization

from internlm2_jax import files
from internlm2_jax.errors import UserError

Config = fdl.Config
Partial = fdl.Partial


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


def module(path: str | Path) -> ModuleType:
    """Imports an experiment file by its path. Errors: UserError when absent or broken."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no experiment file {path}; the shipped ones are under experiments/")
    name = "experiment_" + "_".join(path.with_suffix("").parts[-2:])
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; an experiment file ends in .py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    try:
        spec.loader.exec_module(loaded)
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}; mend the experiment file") from error
    if not callable(getattr(loaded, "experiment", None)):
        raise UserError(f"{path} has no function experiment(); add one that returns a Config")
    return loaded


def parse(assignment: str) -> tuple[str, Any]:
    """Splits "a.b=c"; the value is a Python literal, or else the text itself."""
    name, separator, text = assignment.partition("=")
    if not separator or not name.strip():
        raise UserError(f"--set {assignment!r} is not of the form name=value")
    try:
        return name.strip(), ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return name.strip(), text.strip()


def read_overrides(path: str | Path) -> list[str]:
    """Assignments of a file, one "a.b=c" a line; empty lines and those after # do not count."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read overrides from {path}: {error}") from error
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def load(path: str | Path, assignments: Sequence[str] = (), *, function: str = "experiment") -> Any:
    """The config of an experiment file, with "name=value" macros and overrides applied.

    `function` may name another entry of the file, such as "tiny".
    """
    make = _entry(path, function)
    known = inspect.signature(make).parameters
    given = [parse(a) for a in assignments]
    config = make(**{name: value for name, value in given if name in known})
    for name, value in given:
        if name not in known:
            override(config, name, value, macros=tuple(known))
    return config


def macros(path: str | Path, function: str = "experiment") -> tuple[str, ...]:
    """The names that an entry of an experiment file takes as arguments."""
    return tuple(inspect.signature(_entry(path, function)).parameters)


def _entry(path: str | Path, function: str) -> Callable[..., Any]:
    make: Callable[..., Any] | None = getattr(module(path), function, None)
    if make is None:
        raise UserError(f"{path} has no function {function}(); it offers experiment()")
    return make


def include(path: str | Path, **macros: Any) -> Any:
    """The config of another experiment file, for composing; `macros` are its arguments."""
    return module(path).experiment(**macros)


def _fields(node: Any) -> list[str]:
    """Names that can follow `node` in a dotted path."""
    if isinstance(node, fdl.Buildable):
        named = [
            p.name
            for p in inspect.signature(fdl.get_callable(node)).parameters.values()
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        return list(dict.fromkeys([*named, *node.__arguments__]))
    if isinstance(node, Mapping):
        return [str(k) for k in node]
    if isinstance(node, Sequence) and not isinstance(node, str):
        return [str(i) for i in range(len(node))]
    return []


def override(config: Any, path: str, value: Any, *, macros: Sequence[str] = ()) -> None:
    """Sets one field in place. Errors: UserError that names the nearest valid field."""
    node, parts = config, path.split(".")
    for depth, part in enumerate(parts):
        known = _fields(node)
        if part not in known:
            where = ".".join(parts[:depth]) or "the experiment"
            choices = known + (list(macros) if depth == 0 else [])
            offered = ", ".join(choices) if choices else "nothing: it is a plain value"
            raise UserError(
                f"--set {path}: {where} has no field {part!r}; "
                f"{_nearest(part, choices)}it has: {offered}"
            )
        if depth < len(parts) - 1:
            node = _child(node, part)
            continue
        old = _child(node, part)
        if isinstance(old, (fdl.Buildable, Mapping)) and not isinstance(value, type(old)):
            inner = ", ".join(_fields(old))
            raise UserError(f"--set {path}: it is a group, set one of its fields: {inner}")
        if _is_number(old) and not _is_number(value) and value is not None:
            raise UserError(f"--set {path}: expected a number like {old!r}, got {value!r}")
        if isinstance(node, fdl.Buildable):
            setattr(node, part, value)
        else:
            node[part if isinstance(node, Mapping) else int(part)] = value


def _child(node: Any, part: str) -> Any:
    if isinstance(node, fdl.Buildable):
        return getattr(node, part, None)
    return node[part] if isinstance(node, Mapping) else node[int(part)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def flatten(config: Any) -> dict[str, Any]:
    """{dotted path: value} of all that is set."""
    return dict(printing.as_dict_flattened(config))


def text(config: Any) -> str:
    """One "path = value" a line: what is saved, diffed and kept as golden files."""
    return "".join(f"{path} = {value!r}\n" for path, value in flatten(config).items())


def diff(a: Any, b: Any) -> list[str]:
    """Lines "path: old -> new" where two configs, or two saved flat dicts, differ."""
    old = a if isinstance(a, dict) else flatten(a)
    new = b if isinstance(b, dict) else flatten(b)
    absent = "(unset)"
    return [
        f"{path}: {old.get(path, absent)!r} -> {new.get(path, absent)!r}"
        for path in dict.fromkeys([*old, *new])
        if old.get(path, absent) != new.get(path, absent)
    ]


def save(config: Any, folder: str | Path) -> None:
    """Writes config.txt (flat text), config.json (Fiddle's form, loads back) to a run folder."""
    folder = Path(folder)
    files.atomic_write(folder / "config.txt", text(config))
    files.atomic_write(folder / "config.json", serialization.dump_json(config))


def saved(folder: str | Path) -> Any:
    """The config of a run folder, loaded back from its config.json."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; give the folder of a run")
    return serialization.load_json(path.read_text())


build = fdl.build


def describe(value: Any) -> Any:
    """The JSON form of a built value, defaults included: what a stage's fingerprint is made of."""
    if isinstance(value, functools.partial):
        call = f"{value.func.__module__}.{value.func.__qualname__}"
        parameters = inspect.signature(value.func).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        return {"call": call, **{k: describe(v) for k, v in (defaults | value.keywords).items()}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__qualname__, **named}
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value) if isinstance(value, Path) else value
