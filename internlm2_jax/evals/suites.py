"""What a benchmark is: where its items are, how they are asked and how answers are graded.

A suite is a dataclass, or an entry of a YAML file with the same fields. Those of the InternLM2
report (section 5) are in the folder beside this file, a file for each dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from internlm2_jax.errors import UserError

Method = Literal["likelihood", "generation", "session"]
BUILT_IN = Path(__file__).parent / "suites"
DIMENSIONS = (
    "examinations", "language and knowledge", "reasoning and mathematics", "code", "long context",
    "tools", "alignment",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Data:
    """Where items are inside the folder.

    files, shots: globs; the first star of each stands for the group, and the examples of an item
      are those of its group.
    fields: names of the format's fields in these files where they differ, as in
      messages.0.content; null where they have none.
    columns: of tables without a head. records: key of the list in a JSON file.
    only, shots_only: {field: [least, most]} of the rows that count.
    """

    files: str
    shots: str = ""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    columns: tuple[str, ...] = ()
    records: str = ""
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shots_only: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Suite:
    """Attributes:
    format: how rows are read (formats.py). measure: how answers are graded (measures.py).
    data: layouts in which the data set is found; the first whose files are there is read.
    hub: where it is on the Hugging Face hub.
    header, prompt, option, answer: templates over an item's fields. A prompt without chat is
      header, then examples as prompt + glue + answer + separator, then prompt.
    shots: how many examples come before the question.
    method: "likelihood" takes the choice of the highest log-probability, "generation" reads text,
      "session" runs code over several turns.
    labels: with likelihood, what is compared: "letters", or the choices' "texts".
    by_bytes: compare log-probability per UTF-8 byte.
    chat: ask in ChatML turns.
    max_new_tokens, stop, samples, temperature, top_p: of generation. k: of pass@k.
    cut: of a prompt too long for the model, what is left out: its "left" or its "middle".
    groups: {group: fields of this suite that differ there}.
    options: of the format or the measure.
    """

    name: str
    dimension: str
    format: str
    measure: str
    data: tuple[Data, ...] = ()
    hub: str = ""
    header: str = ""
    prompt: str = "{question}"
    option: str = "{letter}. {text}"
    answer: str = "{answer}"
    glue: str = " "
    separator: str = "\n\n"
    shots: int = 0
    method: Method = "generation"
    labels: Literal["letters", "texts"] = "letters"
    by_bytes: bool = False
    chat: bool = False
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    k: tuple[int, ...] = (1,)
    cut: Literal["left", "middle"] = "left"
    groups: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        from internlm2_jax.evals.formats import FORMATS
        from internlm2_jax.evals.measures import MEASURES

        for field, value, known in (
            ("dimension", self.dimension, DIMENSIONS),
            ("format", self.format, FORMATS),
            ("measure", self.measure, MEASURES),
            ("method", self.method, ("likelihood", "generation", "session")),
            ("labels", self.labels, ("letters", "texts")),
            ("cut", self.cut, ("left", "middle")),
        ):
            if value not in known:
                raise UserError(
                    f"suite {self.name}: {field} is {value!r}; it is one of {', '.join(known)}"
                )
        for field, least in (("shots", 0), ("samples", 1), ("max_new_tokens", 1)):
            if getattr(self, field) < least:
                raise UserError(
                    f"suite {self.name}: {field} is {getattr(self, field)}; the least is {least}"
                )
        if self.samples > 1 and self.temperature == 0:
            raise UserError(
                f"suite {self.name}: {self.samples} samples at temperature 0 are all the same; "
                "give a temperature"
            )
        if bad := [k for k in self.k if not 1 <= k <= self.samples]:
            raise UserError(
                f"suite {self.name}: pass@{bad[0]} needs as many samples; there are {self.samples}"
            )

    def of_group(self, group: str) -> Suite:
        """The suite as it is for the items of one group."""
        return dataclasses.replace(self, **self.groups[group]) if group in self.groups else self


def of(name: str, entry: Any, where: str) -> Suite:
    """A suite from plain data. Errors: UserError that names file, suite and field."""
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: suite {name} is {type(entry).__name__}; expected fields")
    layouts = [_checked(Data, f"{where}: {name}, data", layout) for layout in entry.get("data", ())]
    groups = {
        group: _fields(Suite, f"{where}: {name}, groups, {group}", fields)
        for group, fields in entry.get("groups", {}).items()
    }
    given = {**entry, "name": name, "data": tuple(layouts), "groups": groups}
    suite: Suite = _checked(Suite, f"{where}: {name}", given)
    for group in groups:
        suite.of_group(group)
    return suite


def _checked(kind: Any, where: str, given: Any) -> Any:
    fields = _fields(kind, where, given)
    try:
        return kind(**fields)
    except TypeError as error:
        raise UserError(f"{where}: {error}") from error


def _fields(kind: Any, where: str, given: Any) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(given, Mapping):
        raise UserError(f"{where} is {type(given).__name__}; expected fields")
    if unknown := sorted(set(given) - known):
        raise UserError(f"{where} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def read(path: Path) -> dict[str, Suite]:
    """Suites of a YAML file, by name."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} is {type(content).__name__}; expected suites by name")
    return {name: of(name, entry, str(path)) for name, entry in content.items()}


def built_in() -> dict[str, Suite]:
    """The suites that come with the project, by name, in the order of the dimensions."""
    every = [suite for path in sorted(BUILT_IN.glob("*.yaml")) for suite in read(path).values()]
    return {
        suite.name: suite for suite in sorted(every, key=lambda s: DIMENSIONS.index(s.dimension))
    }


def find(name: str) -> list[Suite]:
    """The suite of that name, all of a dimension, or all in a YAML file."""
    if name.endswith((".yaml", ".yml")):
        return list(read(Path(name)).values())
    known = built_in()
    if name in known:
        return [known[name]]
    if name in DIMENSIONS:
        return [suite for suite in known.values() if suite.dimension == name]
    raise UserError(
        f"no suite {name!r}; there are {', '.join(known)}; or give a dimension, or a YAML file"
    )
