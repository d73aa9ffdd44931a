"""Licence expressions in the SPDX syntax (`MIT OR Apache-2.0`, `GPL-2.0-only WITH
Classpath-exception-2.0`): reading loosely written ones, and whether they permit."""

from __future__ import annotations

import re
from collections.abc import Collection

# What may be trained on and redistributed with attribution at most. CC0 to ZPL-2.1 as the Blue Oak
# Council rates them "bronze" or better, without weak copyleft (MPL, LGPL, EPL).
PERMISSIVE = (
    "0BSD", "AFL-3.0", "Apache-1.1", "Apache-2.0", "Artistic-2.0", "BSD-1-Clause",
    "BSD-2-Clause", "BSD-2-Clause-Patent", "BSD-3-Clause", "BSD-3-Clause-Clear", "BSD-4-Clause",
    "BSL-1.0", "Beerware", "BlueOak-1.0.0", "CC-BY-3.0", "CC-BY-4.0", "CC0-1.0", "CNRI-Python",
    "FTL", "HPND", "HPND-sell-variant", "ICU", "ISC", "LicenseRef-public-domain", "Libpng",
    "MIT", "MIT-0", "MIT-CMU", "MulanPSL-2.0", "NCSA", "OpenSSL", "PHP-3.01", "PSF-2.0",
    "PostgreSQL", "Python-2.0", "Ruby", "TCL", "UPL-1.0", "Unicode-3.0", "Unicode-DFS-2016",
    "Unlicense", "Vim", "W3C", "WTFPL", "X11", "ZPL-2.1", "Zlib", "blessing", "bzip2-1.0.6",
    "curl",
)  # fmt: skip
# Known identifiers that do not permit, or only under conditions on the derived work.
_OTHERS = (
    "AGPL-3.0-only", "AGPL-3.0-or-later", "Artistic-1.0", "BUSL-1.1", "CDDL-1.0", "CDDL-1.1",
    "CPL-1.0", "ECL-2.0", "EPL-1.0", "EPL-2.0", "EUPL-1.1", "EUPL-1.2", "Elastic-2.0",
    "GPL-1.0-or-later", "GPL-2.0-only", "GPL-2.0-or-later", "GPL-3.0-only", "GPL-3.0-or-later",
    "JSON", "LGPL-2.0-only", "LGPL-2.0-or-later", "LGPL-2.1-only", "LGPL-2.1-or-later",
    "LGPL-3.0-only", "LGPL-3.0-or-later", "MPL-1.0", "MPL-1.1", "MPL-2.0", "MS-PL", "MS-RL",
    "OFL-1.1", "OSL-3.0", "QPL-1.0", "SSPL-1.0",
)  # fmt: skip
_CANONICAL = {name.lower(): name for name in PERMISSIVE + _OTHERS}
_EXCEPTIONS = {
    "llvm-exception": "LLVM-exception",
    "classpath-exception-2.0": "Classpath-exception-2.0",
    "gcc-exception-3.1": "GCC-exception-3.1",
    "linux-syscall-note": "Linux-syscall-note",
    "openssl-exception": "openvpn-openssl-exception",
}
_GNU = re.compile(
    r"(agpl|lgpl|gpl)[- ]?v?(\d(?:\.\d)?)(?:\.0)?(\+|-or-later|-only)?", re.IGNORECASE
)

# What people write for a licence; compared without punctuation, "license", "the", "version", "v".
_ALIASES = {
    "MIT": ("mit", "mit expat", "expat", "mit x11", "x11 mit"),
    "Apache-2.0": (
        "apache", "apache 2", "apache 2 0", "apache software", "apache software 2 0", "asl 2 0",
        "apache2", "apache2 0", "al2", "apache 2 0 software", "asf 2 0",
    ),
    "BSD-3-Clause": (
        "bsd", "new bsd", "modified bsd", "bsd 3 clause", "3 clause bsd", "bsd 3", "bsd3",
        "bsd new", "revised bsd", "bsd style", "bsd 3 clause new or revised", "bsd like",
        "bsd three clause", "three clause bsd",
    ),
    "BSD-2-Clause": ("simplified bsd", "bsd 2 clause", "2 clause bsd", "freebsd", "bsd 2", "bsd2",
                     "bsd 2 clause simplified", "two clause bsd"),
    "ISC": ("isc", "iscl", "isc iscl", "isc isc"),
    "MPL-2.0": ("mpl", "mpl 2 0", "mpl2", "mozilla public", "mozilla public 2 0", "mpl 2",
                "mozilla public 2 0 mpl 2 0"),
    "MPL-1.1": ("mpl 1 1", "mozilla public 1 1"),
    "PSF-2.0": ("psf", "psfl", "python software foundation", "psf 2 0", "python"),
    "Unlicense": ("unlicense", "un", "unlicense unlicense"),
    "CC0-1.0": ("cc0", "cc0 1 0", "cc0 1 0 universal", "creative commons zero", "cc zero"),
    "LicenseRef-public-domain": ("public domain",),
    "Zlib": ("zlib", "zlib libpng"),
    "BSL-1.0": ("boost", "boost software 1 0", "boost software", "bsl 1 0"),
    "BUSL-1.1": ("business source", "business source 1 1", "busl 1 1"),
    "WTFPL": ("wtfpl", "wtfpl 2"),
    "EPL-1.0": ("eclipse public 1 0", "epl 1 0", "eclipse public"),
    "EPL-2.0": ("eclipse public 2 0", "epl 2 0"),
    "CDDL-1.0": ("cddl", "cddl 1 0", "common development and distribution"),
    "Artistic-2.0": ("artistic 2 0",),
    "ZPL-2.1": ("zpl", "zpl 2 1", "zope public", "zope public 2 1"),
    "PostgreSQL": ("postgresql",),
    "HPND": ("hpnd", "historical permission notice and disclaimer"),
    "MIT-CMU": ("mit cmu",),
    "NCSA": ("ncsa", "university of illinois ncsa open source"),
    "EUPL-1.2": ("eupl", "eupl 1 2"),
    "OFL-1.1": ("ofl", "sil open font", "ofl 1 1"),
    "GPL-3.0-only": ("gpl 3", "gpl 3 0", "gplv3", "gnu gpl 3", "gnu general public 3",
                     "gnu general public 3 0", "gnu gplv3"),
    "GPL-3.0-or-later": ("gplv3+", "gpl 3+", "gnu general public 3 or later",
                         "gnu gpl 3 or later", "gnu general public 3 or later gplv3+"),
    "GPL-2.0-only": ("gpl 2", "gpl 2 0", "gplv2", "gnu gpl 2", "gnu general public 2", "gnu gplv2",
                     "gnu general public 2 gplv2"),
    "GPL-2.0-or-later": ("gplv2+", "gpl 2+", "gnu general public 2 or later",
                         "gnu gpl 2 or later", "gnu general public 2 or later gplv2+"),
    "GPL-1.0-or-later": ("gpl", "gnu gpl", "gnu general public", "gnu general public gpl"),
    "LGPL-2.1-only": ("lgpl 2 1", "lgplv2 1", "gnu lesser general public 2 1"),
    "LGPL-3.0-only": ("lgpl 3", "lgplv3", "lgpl 3 0", "gnu lesser general public 3",
                      "gnu lesser general public 3 lgplv3"),
    "LGPL-3.0-or-later": ("lgplv3+", "lgpl 3+", "gnu lesser general public 3 or later",
                          "gnu lesser general public 3 or later lgplv3+"),
    "LGPL-2.1-or-later": ("lgpl", "gnu lgpl", "gnu lesser general public", "lgplv2+",
                          "gnu library or lesser general public lgpl", "lgplv2 1+"),
    "AGPL-3.0-only": ("agpl", "agpl 3", "agplv3", "agpl 3 0", "gnu affero general public 3",
                      "gnu affero general public", "gnu agpl", "gnu agplv3"),
    "AGPL-3.0-or-later": ("agplv3+", "gnu affero general public 3 or later agplv3+"),
}  # fmt: skip
_BY_ALIAS = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}
_NOISE = re.compile(
    r"\b(?:the|licen[cs]ed?|licen[cs]es|under|version|terms|of|v(?=\.?\s?\d)|ver)\b|[^a-z0-9+]+"
)

# ("id", name) | ("with", name, exception) | ("and" | "or", left, right)
Tree = tuple


class _Malformed(ValueError):
    pass


def identifier(name: str) -> str | None:
    """The SPDX identifier for what somebody wrote as a licence's name, or None."""
    name = " ".join(name.split()).strip(" .,;")
    if not name or len(name) > 100:
        return None
    if known := _CANONICAL.get(name.lower()):
        return known
    if match := _GNU.fullmatch(name):
        family, number, later = match[1].upper(), match[2], match[3] or ""
        number = number if "." in number else f"{number}.0"
        written = f"{family}-{number}-{'only' if later in ('', '-only') else 'or-later'}"
        return _CANONICAL.get(written.lower())
    plain = " ".join(_NOISE.sub(" ", re.sub(r"v\.?\s?(?=\d)", " ", name.lower())).split())
    if plain in _BY_ALIAS:
        return _BY_ALIAS[plain]
    # "The MIT License (MIT)"
    outside = re.sub(r"\s*\([^()]*\)$", "", name)
    return identifier(outside) if outside != name else None


def parse(expression: str) -> Tree | None:
    """None when the text is no expression. Identifiers that are well formed but unknown are kept;
    `/` and `,` of older metadata mean OR and AND."""
    if len(expression) > 1000:
        return None
    text = re.sub(r"\s*/\s*", " OR ", expression)
    text = re.sub(r"\s*[,;&]\s*", " AND ", text)
    tokens = re.findall(r"[()]|[^\s()]+", text)
    position = 0

    def peek() -> str:
        return tokens[position].upper() if position < len(tokens) else ""

    def take() -> str:
        nonlocal position
        position += 1
        return tokens[position - 1]

    def simple(depth: int) -> Tree:
        if depth > 20 or peek() in ("", ")", "OR", "AND", "WITH"):
            raise _Malformed
        token = take()
        if token == "(":
            inside = either(depth + 1)
            if peek() != ")":
                raise _Malformed
            take()
            return inside
        name = identifier(token)
        if name is None:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.\-]*\+?", token):
                raise _Malformed
            name = token
        if peek() == "WITH":
            take()
            exception = take() if peek() else ""
            if not re.fullmatch(r"[A-Za-z0-9.\-]+", exception):
                raise _Malformed
            return ("with", name, _EXCEPTIONS.get(exception.lower(), exception))
        return ("id", name)

    def both(depth: int) -> Tree:
        tree = simple(depth)
        while peek() == "AND":
            take()
            tree = ("and", tree, simple(depth))
        return tree

    def either(depth: int) -> Tree:
        tree = both(depth)
        while peek() == "OR":
            take()
            tree = ("or", tree, both(depth))
        return tree

    try:
        tree = either(0)
    except _Malformed:
        return None
    return tree if position == len(tokens) else None


def render(tree: Tree) -> str:
    kind = tree[0]
    if kind == "id":
        return tree[1]
    if kind == "with":
        return f"{tree[1]} WITH {tree[2]}"
    sides = [
        f"({render(side)})" if kind == "and" and side[0] == "or" else render(side)
        for side in tree[1:]
    ]
    return f" {kind.upper()} ".join(sides)


def identifiers(tree: Tree) -> set[str]:
    if tree[0] == "id":
        return {tree[1]}
    if tree[0] == "with":
        return {f"{tree[1]} WITH {tree[2]}"}
    return identifiers(tree[1]) | identifiers(tree[2])


def normalize(text: str) -> str | None:
    """Canonical expression for what a package's metadata or an SPDX line says; None when it names
    no licence that is known. "MIT/Apache-2.0" is "MIT OR Apache-2.0"."""
    if whole := identifier(text):
        return whole
    tree = parse(text)
    if tree is None:
        # Names of several words: "Apache License 2.0 or MIT License".
        parts = re.split(r"\s+(?:or|and)\s+|\s*[/,;]\s*", text.strip(), flags=re.IGNORECASE)
        names = [identifier(part) for part in parts]
        if len(parts) < 2 or None in names:
            return None
        operator = " AND " if re.search(r"\sand\s|[,;]", text, re.IGNORECASE) else " OR "
        return operator.join(dict.fromkeys(name for name in names if name))
    known = any(name.split(" WITH ")[0] in _CANONICAL.values() for name in identifiers(tree))
    return render(tree) if known else None


def combine(expressions: Collection[str], operator: str) -> str | None:
    """`operator` is "AND" or "OR"; repeated parts once, in order of first appearance."""
    parts = list(dict.fromkeys(expressions))
    if len(parts) < 2:
        return parts[0] if parts else None
    other = " OR " if operator == "AND" else " AND "
    return f" {operator} ".join(f"({part})" if other in part else part for part in parts)


def permits(expression: str, allowed: Collection[str] = PERMISSIVE) -> bool:
    """Whether some choice the expression offers is made of `allowed` licences only. An exception
    (WITH) only adds permissions, so the licence alone decides."""

    def allows(tree: Tree) -> bool:
        if tree[0] == "id":
            return tree[1] in allowed
        if tree[0] == "with":
            return tree[1] in allowed or f"{tree[1]} WITH {tree[2]}" in allowed
        sides = (allows(tree[1]), allows(tree[2]))
        return all(sides) if tree[0] == "and" else any(sides)

    tree = parse(expression)
    return tree is not None and allows(tree)
