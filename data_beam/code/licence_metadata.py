"""The licence that a package's metadata names: package.json, Cargo.toml, pyproject.toml, setup.cfg,
pom.xml and their like."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from data_beam.code import spdx
from data_beam.code.licence_texts import classify

_MAX_CHARS = 200_000
_FIELD = re.compile(
    r"(?im)^[ \t]*[\"']?license(?:[-_]expression)?[\"']?[ \t]*[:=][ \t]*[\"']?([^\"'\n]{2,80}?)"
    r"[\"']?[ \t,]*$"
)


def _from_classifiers(lines: Iterable[str]) -> str | None:
    names = []
    for line in lines:
        parts = [part.strip() for part in line.split("::")]
        if parts[0] == "License" and len(parts) > 1 and (known := spdx.identifier(parts[-1])):
            names.append(known)
    return spdx.combine(names, "OR") if names else None


def _text_of(value: Any) -> str | None:
    """A licence as metadata gives it: a string, an object with a name, a list of either."""
    if isinstance(value, str):
        return spdx.normalize(value) or (classify(value) if len(value) > 100 else None)
    if isinstance(value, Mapping):
        return next(
            (
                known
                for key in ("text", "type", "name", "id")
                if (known := _text_of(value.get(key)))
            ),
            None,
        )
    if isinstance(value, list):
        known_names = [known for item in value[:20] if (known := _text_of(item))]
        return spdx.combine(known_names, "OR") if known_names else None
    return None


def _from_json(text: str) -> str | None:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(value, dict):
        return None
    return _text_of(value.get("license")) or _text_of(value.get("licenses"))


def _from_toml(text: str) -> str | None:
    try:
        value = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError):
        return None
    sections = [value.get("package"), value.get("project"), value.get("workspace")]
    tool = value.get("tool")
    sections += [tool.get("poetry")] if isinstance(tool, dict) else []
    sections += [s.get("package") for s in sections[2:3] if isinstance(s, dict)]
    for section in sections:
        if not isinstance(section, dict):
            continue
        classifiers = section.get("classifiers")
        if known := _text_of(section.get("license")):
            return known
        if isinstance(classifiers, list):
            known = _from_classifiers(str(item) for item in classifiers)
            if known:
                return known
    return None


def _from_fields(text: str) -> str | None:
    """`license = MIT` of setup.cfg, `license="MIT"` of setup.py, `License: MIT` of R and Cabal
    packages; and the classifiers between."""
    for match in _FIELD.finditer(text):
        if known := spdx.normalize(match[1].replace("file LICENSE", "").strip(" +")):
            return known
    classifiers = re.findall(r"License :: [^\"'\n]+", text)
    return _from_classifiers(classifiers) if classifiers else None


def _from_headers(text: str) -> str | None:
    """METADATA and PKG-INFO of a Python distribution, up to the empty line before the readme."""
    headers: dict[str, list[str]] = {}
    for line in text.partition("\n\n")[0].split("\n"):
        name, colon, value = line.partition(":")
        if colon and not line[0].isspace():
            headers.setdefault(name.lower(), []).append(value.strip())
    for name in ("license-expression", "license"):
        for value in headers.get(name, ()):
            if known := spdx.normalize(value):
                return known
    return _from_classifiers(headers.get("classifier", ()))


def _from_pom(text: str) -> str | None:
    if match := re.search(r"<licenses>(.*?)</licenses>", text, re.DOTALL):
        names = []
        for licence in re.findall(r"<license>(.*?)</license>", match[1], re.DOTALL)[:10]:
            tags = dict(re.findall(r"<(name|url)>\s*([^<]+?)\s*</", licence))
            known = spdx.normalize(tags.get("name", "")) or classify(
                f"{tags.get('name', '')} {tags.get('url', '')}"
            )
            if known:
                names.append(known)
        return spdx.combine(names, "OR") if names else None
    return None


def _from_gemspec(text: str) -> str | None:
    names = re.findall(r"\.licenses?\s*=\s*\[?\s*[\"']([^\"'\n]+)[\"']", text)
    return spdx.normalize(names[0]) if names else None


_METADATA = {
    "package.json": _from_json, "composer.json": _from_json, "bower.json": _from_json,
    "cargo.toml": _from_toml, "pyproject.toml": _from_toml, "setup.cfg": _from_fields,
    "setup.py": _from_fields, "metadata": _from_headers, "pkg-info": _from_headers,
    "description": _from_fields, "pom.xml": _from_pom,
}  # fmt: skip
_METADATA_ENDINGS = {".gemspec": _from_gemspec, ".cabal": _from_fields, ".pom": _from_pom}


def is_metadata(path: str) -> bool:
    name = path.rsplit("/", 1)[-1].lower()
    return name in _METADATA or name.endswith(tuple(_METADATA_ENDINGS))


def from_metadata(path: str, text: str) -> str | None:
    """From package.json, Cargo.toml, pyproject.toml, setup.cfg, pom.xml and their like."""
    name = path.rsplit("/", 1)[-1].lower()
    reader = _METADATA.get(name)
    if reader is None:
        endings = (e for e in _METADATA_ENDINGS if name.endswith(e))
        reader = _METADATA_ENDINGS.get(next(endings, ""))
    return reader(text[:_MAX_CHARS]) if reader else None
