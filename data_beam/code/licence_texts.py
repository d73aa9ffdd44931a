"""Which licences stand in a text: told by phrases that only they hold, compared in lower case
without punctuation and comment marks, so that reflowed and commented copies match."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

from data_beam.code import spdx

_MAX_CHARS = 200_000
_CHOICE_CHARS = 1500  # at the start, where a choice between licences is offered

# --- Rules of one phrase ---

_PHRASES = {
    "0BSD": ("bsd zero clause license",),
    "AGPL-3.0-only": ("gnu affero general public license version 3 19 november 2007",),
    "Apache-1.1": ("the apache software license version 1.1",),
    "Apache-2.0": (
        "apache license version 2.0 january 2004",
        "under the apache license version 2.0",
        "apache.org licenses license 2.0",
    ),
    "Apache-2.0 WITH LLVM-exception": (
        "apache license v2.0 with llvm exceptions",
        "llvm exceptions to the apache 2.0 license",
    ),
    "Artistic-2.0": ("the artistic license 2.0",),
    "BSL-1.0": ("boost software license version 1.0",),
    "BUSL-1.1": ("business source license 1.1",),
    "Beerware": ("the beer ware license",),
    "CC0-1.0": ("cc0 1.0 universal", "creativecommons.org publicdomain zero 1.0"),
    "CDDL-1.0": ("common development and distribution license cddl version 1.0",),
    "CDDL-1.1": ("common development and distribution license cddl version 1.1",),
    "EPL-1.0": ("eclipse public license v 1.0", "eclipse public license v1.0"),
    "EPL-2.0": (
        "eclipse public license v 2.0",
        "eclipse public license v2.0",
        "eclipse public license 2.0",
    ),
    "EUPL-1.2": ("european union public license v 1.2",),
    "Elastic-2.0": ("elastic license 2.0",),
    "GPL-2.0-only": ("gnu general public license version 2 june 1991",),
    "GPL-3.0-only": ("gnu general public license version 3 29 june 2007",),
    "HPND": (
        "permission to use copy modify and distribute this software and its documentation for any"
        " purpose and without fee is hereby granted",
    ),
    "HPND-sell-variant": (
        "permission to use copy modify distribute and sell this software and its documentation for"
        " any purpose is hereby granted without fee",
        "permission to use copy modify distribute sell this software and its documentation for any"
        " purpose is hereby granted without fee",
    ),
    "LGPL-2.0-only": ("gnu library general public license version 2 june 1991",),
    "LGPL-2.1-only": ("gnu lesser general public license version 2.1 february 1999",),
    "LGPL-3.0-only": ("gnu lesser general public license version 3 29 june 2007",),
    "MPL-1.1": ("mozilla public license version 1.1", "mpl 1.1 gpl 2.0 lgpl 2.1"),
    "MPL-2.0": (
        "mozilla public license version 2.0",
        "subject to the terms of the mozilla public license v 2.0",
    ),
    "MS-PL": ("microsoft public license ms pl",),
    "MulanPSL-2.0": ("mulan permissive software license version 2",),
    "NCSA": ("university of illinois ncsa open source license",),
    "OFL-1.1": ("sil open font license version 1.1",),
    "PHP-3.01": ("the php license version 3.01",),
    "PSF-2.0": (
        "hereby grants licensee a nonexclusive royalty free world wide license to reproduce"
        " analyze test",
    ),
    "PostgreSQL": (
        "permission to use copy modify and distribute this software and its documentation for any"
        " purpose without fee and without a written agreement",
    ),
    "Python-2.0": ("beopen python open source license agreement version 1",),
    "SSPL-1.0": ("server side public license",),
    "UPL-1.0": ("the universal permissive license upl version 1.0",),
    "Unicode-3.0": ("unicode license v3", "unicode.org copyright.html"),
    "Unlicense": ("this is free and unencumbered software released into the public domain",),
    "Vim": ("vim license",),
    "W3C": ("w3c software notice and license",),
    "WTFPL": ("do what the fuck you want to public license",),
    "ZPL-2.1": ("zope public license zpl version 2.1",),
    "blessing": (
        "the author disclaims copyright to this source code in place of a legal notice here is a"
        " blessing",
    ),
}

# --- Rules of several ---


class Rule(NamedTuple):
    """The licence `name` stands where the first of `phrases` does, if the others follow (or stand
    just before) and none of `without` does, up to the next place where a licence begins."""

    name: str
    phrases: tuple[str, ...]
    without: tuple[str, ...] = ()


_MIT = "permission is hereby granted free of charge to any person obtaining a copy"
_MIT_NOTICE = "this permission notice shall be included in all copies or substantial portions"
_GOOD = "the software shall be used for good not evil"
_UNICODE = "of the unicode data files"
_NAME = "except as contained in this notice the name"
_BSD = (
    "redistribution and use in source and binary forms with or without modification are permitted"
)
_SOURCE = "redistributions of source code must retain"
_BINARY = "redistributions in binary form must reproduce the above copyright"
_ENDORSE = "to endorse or promote products derived from this software without"
_ADVERTISE = "all advertising materials mentioning features or use of this software must display"
_PATENTS = "no express or implied licenses to any party s patent rights"
_GRANTS = "each copyright holder and contributor hereby grants"
_ORIGIN = "the origin of this software must not be misrepresented"
_ISC = (
    "permission to use copy modify and or distribute this software for any purpose with or without"
    " fee is hereby granted"
)
_ISC_OLD = _ISC.replace("and or", "and")
_ISC_DOCUMENTED = _ISC_OLD.replace("this software", "this software and its documentation")
_APPEAR = "provided that the above copyright notice and this permission notice appear in all copies"
_ICU = (
    "this permission notice appear in all copies of the software and that both the above copyright"
)
_ZLIB = (
    "this software is provided as is without any express or implied warranty in no event will the"
)
_ALTERED = "altered source versions must be plainly marked"
_RULES = (
    *(Rule(name, (phrase,)) for name, phrases in _PHRASES.items() for phrase in phrases),
    Rule("NCSA", (_MIT, _SOURCE), (_BSD,)),
    Rule("JSON", (_MIT, _GOOD)),
    Rule("Unicode-DFS-2016", (_MIT, _UNICODE), ("unicode license v3",)),
    Rule("ICU", (_MIT, _ICU)),
    Rule("X11", (_MIT, _MIT_NOTICE, _NAME)),
    Rule("MIT", (_MIT, _MIT_NOTICE), (_NAME, _GOOD, _UNICODE)),
    Rule("MIT-0", (_MIT, "the software is provided as is"), ("permission notice", _SOURCE)),
    Rule("OpenSSL", (_BSD, _ADVERTISE, "openssl project")),
    Rule("BSD-4-Clause", (_BSD, _ADVERTISE), ("openssl project",)),
    Rule("BSD-3-Clause-Clear", (_BSD, _ENDORSE, _PATENTS)),
    Rule(
        "BSD-3-Clause",
        (_BSD, _ENDORSE),
        (_ADVERTISE, _PATENTS, "the apache software license version 1.1", "the php license"),
    ),
    Rule("BSD-2-Clause-Patent", (_BSD, _BINARY, _GRANTS)),
    Rule(
        "BSD-2-Clause",
        (_BSD, _BINARY),
        (_ENDORSE, _ADVERTISE, _GRANTS, "the end user documentation included", "neither the name"),
    ),
    Rule("BSD-1-Clause", (_BSD, _SOURCE), ("redistributions in binary form", _ENDORSE, _ORIGIN)),
    Rule("bzip2-1.0.6", (_BSD, _ORIGIN)),
    Rule("BlueOak-1.0.0", ("blue oak model license", "version 1.0.0")),
    Rule("curl", (_ISC_OLD, _APPEAR, _NAME)),
    Rule("ISC", (_ISC, _APPEAR)),
    Rule("ISC", (_ISC_OLD, _APPEAR), (_NAME,)),
    Rule("ISC", (_ISC_DOCUMENTED, _APPEAR), (_NAME,)),
    Rule("0BSD", (_ISC,), (_APPEAR,)),
    Rule("Zlib", (_ZLIB, _ALTERED), ("libpng",)),
    Rule("Libpng", (_ZLIB, _ALTERED, "libpng")),
)
_RULES_AT: dict[str, list[Rule]] = {}
for _rule in _RULES:
    _RULES_AT.setdefault(_rule.phrases[0], []).append(_rule)
_ANCHORS = re.compile("|".join(map(re.escape, sorted(_RULES_AT, key=len, reverse=True))))
_BEFORE = 200  # characters before its first phrase that may hold a licence's title

# Texts that quote or include another one.
_COVERS = {
    "Python-2.0": {"HPND", "0BSD", "PSF-2.0"},
    "Apache-2.0 WITH LLVM-exception": {"Apache-2.0"},
    "NCSA": {"MIT", "MIT-0"},
    "MPL-2.0": {"GPL-2.0-only", "LGPL-2.1-only", "AGPL-3.0-only", "GPL-2.0-or-later"},
}

# --- Notices of the GNU licences, Creative Commons, and licences that are only named ---

_GNU_NOTICE = re.compile(
    r" gnu (?P<kind>lesser |library |affero |library or lesser )?"
    r"(?:general public license|[al]?gpl)"
    r"(?:(?: [^ ]+){0,40}? (?:version |v\.? ?)| )(?P<number>[123](?:\.[01])?)(?= )"
    r"(?P<after>(?: [^ ]+){0,14})"
)
_GNU_TEXT = re.compile(
    r"gnu (?:\w+ )?general public license version [\d.]+,? (?:\d+ )?(?:june|february|november)"
    r" \d{4}"
)
_LINKING = "linking this library statically or dynamically with other modules"
_GNU_EXCEPTIONS = (
    ("gcc runtime library exception", "GCC-exception-3.1"),
    ("classpath exception", "Classpath-exception-2.0"),
    (_LINKING, "Classpath-exception-2.0"),
)
_CREATIVE_COMMONS = re.compile(
    r"creative commons attribution(?P<nc> non ?commercial)?(?P<sa> share ?alike)?"
    r"(?P<nd> no ?deriv(?:ative)?s)?(?P<sa2> share ?alike)? (?P<number>\d\.\d)"
    r"|creativecommons\.org licenses (?P<code>by(?: nc)?(?: nd)?(?: sa)?) (?P<number2>\d\.\d)"
)
_UNDER = re.compile(
    r" (?:licensed|released|distributed|available|covered|published|governed|redistributed|used"
    r"|provided|subject)(?: \S+){0,6}? (?:under|by|with|to) "
)
_UNDER_CHARS = 160  # after it, among which the licences are named
_NUMBER = r"(?:version |v\.? ?)?"
_NAMES = re.compile(
    rf"(?<= )(?:(?:gnu )?(?:agpl|lgpl|gpl) ?{_NUMBER}\d(?:\.\d)?\+?|(?:gnu )?(?:agpl|lgpl|gpl)"
    r"|gnu (?:lesser |affero )?general public license|mit x11|mit|isc"
    r"|(?:new|modified|revised|simplified|two clause|2 clause|three clause|3 clause) bsd"
    rf"|bsd [23] clause|bsd|apache (?:software )?(?:license )?{_NUMBER}2(?:\.0)?|apache license"
    rf"|zlib|wtfpl|unlicense|cc0|mozilla public license(?: {_NUMBER}\d\.\d)?|mpl ?{_NUMBER}\d\.\d"
    r"|boost software license|python software foundation license|psf)(?= )"
)
_TAGGED = re.compile(
    r"(?m)^[^\w\n]*+licen[cs]e[ \t]*(?:[:=]|[ \t])[ \t]*([^\n]{2,80})$", re.IGNORECASE
)
_PUBLIC_DOMAIN = re.compile(
    r"(?:this (?:file|code|software|work|program|source \w+) (?:is|has been)|released|placed|put"
    r"|dedicated)(?: \S+){0,4}? (?:in|into|to) the public domain"
)
_CHOICE = re.compile(
    r"dual licen|either of|alternatively|at your (?:option|choice)(?! any later)"
    r"|\bor the (?:mit|apache|bsd|gnu)|licenses? or (?:the )?\S+ licen"
)
# What follows such a sentence is the licence of something else that comes along.
_BUNDLED = re.compile(
    r" (?:bundles?|bundled|incorporates|vendors|third party|3rd party|subcomponents)(?: \S+){0,8}"
    r" (?:librar|software|component|code|files?|projects?|licen|notices|packages?|sources?|fonts?)"
)
_MARKS = re.compile(
    r"(?m)^[ \t]*(?:/?\*+/?|//+!?|#+|;+|--+|%+|dnl\b|\.\.|@?rem\b|\"|'|!+|>|\|)[ \t]?",
    re.IGNORECASE,
)
_PUNCTUATION = re.compile(r"(?:[^a-z0-9.+]|\.(?![0-9a-z])|(?<![0-9a-z])\.)+")


def plain(text: str) -> str:
    """Lower case, comment marks removed, every run of punctuation and white space one space."""
    text = _MARKS.sub("", text[:_MAX_CHARS]).lower().replace("licence", "license")
    text = re.sub(r"https?://(?:www\.)?", "", text)
    return f" {_PUNCTUATION.sub(' ', text).strip()} "


def classify(text: str) -> str | None:
    """The expression of the licences whose text or notice stands in `text`, but for those of what
    the work bundles."""
    words = plain(text)
    found = _by_rules(words)
    if not _GNU_TEXT.search(words):  # the texts of the GPL quote notices
        found += _gnu(words)
    found += _creative_commons(words)
    found.sort()
    if found and (bundled := _BUNDLED.search(words, found[0][0] + 300)):
        found = [(where, name) for where, name in found if where < bundled.start()]
    names = [name for _, name in found]
    covered = set().union(*(_COVERS.get(name, ()) for name in names))
    names = [name for name in names if name not in covered]
    if not names:
        names = _named(words, text[:_MAX_CHARS])
    if not names and _PUBLIC_DOMAIN.search(words):
        names = ["LicenseRef-public-domain"]
    names = list(dict.fromkeys(names))
    choice = len(names) > 1 and _CHOICE.search(words, 0, _CHOICE_CHARS)
    return spdx.combine(names, "OR" if choice else "AND")


def _by_rules(words: str) -> list[tuple[int, str]]:
    """Places and names of the licences that `_RULES` find, in order."""
    anchors = [(match.start(), match[0]) for match in _ANCHORS.finditer(words)]
    found = []
    for (start, anchor), (end, _) in itertools.pairwise([*anchors, (len(words), "")]):
        near = words[max(0, start - _BEFORE) : end]
        found += [
            (start, rule.name)
            for rule in _RULES_AT[anchor]
            if all(phrase in near for phrase in rule.phrases)
            and not any(phrase in near for phrase in rule.without)
        ]
    return found


def _gnu(words: str) -> list[tuple[int, str]]:
    """Notices ("under the terms of the GNU General Public License ... version 2 ... or later")."""
    found = []
    for match in _GNU_NOTICE.finditer(words):
        head = match[0][:20]
        family = "GPL"
        if "affero" in head or "agpl" in head:
            family = "AGPL"
        elif match["kind"] or "lgpl" in head:
            family = "LGPL"
        number = match["number"] if "." in match["number"] else f"{match['number']}.0"
        later = "any later version" in match["after"] or "or later" in match["after"]
        name = f"{family}-{number}-{'or-later' if later else 'only'}"
        if spdx.identifier(name):
            found.append((match.start(), name))
    # "version 3 of the GPL" is said again further down.
    names = {name for _, name in found}
    found = [
        (where, name)
        for where, name in found
        if not (name.endswith("only") and name.replace("only", "or-later") in names)
    ]
    for phrase, exception in _GNU_EXCEPTIONS:
        if phrase in words:
            return [(where, f"{name} WITH {exception}") for where, name in found]
    return found


def _creative_commons(words: str) -> list[tuple[int, str]]:
    found = []
    for match in _CREATIVE_COMMONS.finditer(words):
        code = (match["code"] or "").upper().replace(" ", "-")
        if not code:
            share = match["sa"] or match["sa2"]
            parts = (("NC", match["nc"]), ("ND", match["nd"]), ("SA", share))
            code = "-".join(["BY", *(part for part, said in parts if said)])
        found.append((match.start(), f"CC-{code}-{match['number'] or match['number2']}"))
    return found


def _named(words: str, raw: str) -> list[str]:
    """Of "licensed under the MIT license", "@license MIT"."""
    found = []
    for match in _UNDER.finditer(words):
        window = words[match.end() - 1 : match.end() + _UNDER_CHARS]
        for name in _NAMES.finditer(window):
            if known := spdx.identifier(name[0]):
                found.append(known)
    for match in _TAGGED.finditer(_MARKS.sub("", raw)):
        said = match[1].strip(" */.->")
        if known := spdx.normalize(said) or spdx.normalize(re.split(r"[,;(]| see | - ", said)[0]):
            found.append(known)
    return found
