"""Licences of files, of packages and of repositories; expressions."""

import importlib.metadata
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.licenses import canonicalize_license_expression

from data_beam.code import licence_texts, licences, spdx

COMMON = Path("/usr/share/common-licenses")

MIT = """Copyright (c) 2020 A. Author

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND.
"""
BSD = """Redistribution and use in source and binary forms, with or without
modification, are permitted provided that the following conditions are met:
1. Redistributions of source code must retain the above copyright notice.
2. Redistributions in binary form must reproduce the above copyright notice.
{third}
THIS SOFTWARE IS PROVIDED "AS IS".
"""
BSD_2 = BSD.format(third="")
BSD_3 = BSD.format(
    third="3. Neither the name of the copyright holder nor the names of its contributors may be\n"
    "used to endorse or promote products derived from this software without specific prior\n"
    "written permission.\n"
)
BSD_4 = BSD.format(
    third="3. All advertising materials mentioning features or use of this software must display\n"
    "the following acknowledgement: made by A.\n4. The names may not be used to endorse or\n"
    "promote products derived from this software without permission."
)
ISC = """Permission to use, copy, modify, and/or distribute this software for any
purpose with or without fee is hereby granted, provided that the above
copyright notice and this permission notice appear in all copies.
"""
ZERO_BSD = """Permission to use, copy, modify, and/or distribute this software for any
purpose with or without fee is hereby granted.
"""
ZLIB = """This software is provided 'as-is', without any express or implied
warranty.  In no event will the authors be held liable for any damages.
2. Altered source versions must be plainly marked as such.
"""
UNLICENSE = "This is free and unencumbered software released into the public domain.\n"
APACHE = """Licensed under the Apache License, Version 2.0 (the "License");
you may not use this file except in compliance with the License.
You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
GPL = """This program is free software; you can redistribute it and/or modify
it under the terms of the GNU General Public License as published by
the Free Software Foundation; either version 2 of the License, or
(at your option) any later version.
"""
MPL = """This Source Code Form is subject to the terms of the Mozilla Public
License, v. 2.0. If a copy of the MPL was not distributed with this file, ...
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MIT, "MIT"),
        (MIT.replace("and this permission", "X").replace("above copyright notice", ""), "MIT-0"),
        (BSD_2, "BSD-2-Clause"), (BSD_3, "BSD-3-Clause"), (BSD_4, "BSD-4-Clause"),
        (ISC, "ISC"), (ZERO_BSD, "0BSD"), (ZLIB, "Zlib"), (UNLICENSE, "Unlicense"),
        (APACHE, "Apache-2.0"), (GPL, "GPL-2.0-or-later"), (MPL, "MPL-2.0"),
        (GPL.replace("General", "Lesser General").replace("2 of", "2.1 of"), "LGPL-2.1-or-later"),
        (GPL.replace("version 2", "version 3").replace("(at your option) any later version", "x"),
         "GPL-3.0-only"),
        (GPL.replace("General", "Affero General").replace("version 2", "version 3"),
         "AGPL-3.0-or-later"),
        (GPL + "with the GCC Runtime Library Exception, version 3.1",
         "GPL-2.0-or-later WITH GCC-exception-3.1"),
        ("Creative Commons Attribution-ShareAlike 4.0 International", "CC-BY-SA-4.0"),
        ("https://creativecommons.org/licenses/by-nc-nd/3.0/", "CC-BY-NC-ND-3.0"),
        ("CC0 1.0 Universal", "CC0-1.0"), ("Boost Software License - Version 1.0", "BSL-1.0"),
        ("Business Source License 1.1", "BUSL-1.1"),
        ("EUROPEAN UNION PUBLIC LICENCE v. 1.2", "EUPL-1.2"),
        ("This file is in the public domain.", "LicenseRef-public-domain"),
        ("Released under the MIT license.", "MIT"),
        (":license: BSD, see LICENSE for details.", "BSD-3-Clause"),
        ("Use of this source code is governed by a BSD-style license that can be found in the"
         " LICENSE file.", "BSD-3-Clause"),
        ("distributed under the GNU GPL v2 with a Linking Exception.", "GPL-2.0-only"),
        ("Licensed under either of the Apache License, Version 2.0 or the MIT license, at your"
         " option.", "Apache-2.0 OR MIT"),
        (f"{MIT}\n{APACHE}", "MIT AND Apache-2.0"),
        (f"{BSD_3}\n\nThis project bundles several libraries.\n{GPL}", "BSD-3-Clause"),
        ("Copyright 2020. All rights reserved.", None), ("", None),
        ("The licence of the plate is long.", None),
    ],
)  # fmt: skip
def test_texts_and_notices(text, expected):
    assert licence_texts.classify(text) == expected
    reflowed = " ".join(text.split())
    if "license:" not in text:
        assert licence_texts.classify(reflowed) == expected
    commented = "".join(f" * {line}\n" for line in text.splitlines())
    assert licence_texts.classify(f"/*\n{commented} */") == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("GPL-2", "GPL-2.0-only"), ("GPL-3", "GPL-3.0-only"), ("LGPL-2.1", "LGPL-2.1-only"),
        ("LGPL-2", "LGPL-2.0-only"), ("LGPL-3", "LGPL-3.0-only"), ("Apache-2.0", "Apache-2.0"),
        ("MPL-2.0", "MPL-2.0"), ("CC0-1.0", "CC0-1.0"), ("BSD", "BSD-3-Clause"),
        ("MPL-1.1", "MPL-1.1"),
    ],
)  # fmt: skip
def test_whole_texts(name, expected):
    path = COMMON / name
    if not path.exists():
        pytest.skip(f"{path} is absent: it comes with Debian")
    assert licence_texts.classify(path.read_text()) == expected


@pytest.mark.parametrize(
    ("package", "expected"),
    [("numpy", "BSD-3-Clause"), ("jax", "Apache-2.0"), ("click", "BSD-3-Clause"), ("hypothesis", "MPL-2.0"),
     ("pytest", "MIT"), ("pyyaml", "MIT"), ("matplotlib", "PSF-2.0"), ("orjson", None)],
)  # fmt: skip
def test_installed_packages(package, expected):
    files = importlib.metadata.files(package) or []
    info = [f for f in files if f.parts[0].endswith(".dist-info")]
    texts = [f for f in info if licences.is_licence_file(f.name)]
    found = {licence_texts.classify(f.read_text()) for f in texts}
    if expected:
        assert expected in found
    else:
        assert found >= {"Apache-2.0", "MIT"}
    (metadata,) = [f for f in info if f.name == "METADATA"]
    said = licences.from_metadata(metadata.name, metadata.read_text())
    if expected and said:
        assert expected.split("-")[0] in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("// SPDX-License-Identifier: MIT\nint x;", "MIT"),
        (
            "/* SPDX-License-Identifier: GPL-2.0+ WITH Linux-syscall-note */",
            "GPL-2.0-or-later WITH Linux-syscall-note",
        ),
        ("# SPDX-License-Identifier: (mit OR apache-2.0)\n", "MIT OR Apache-2.0"),
        ("#!/bin/sh\n#\n# SPDX-License-Identifier: GPL-2.0\n", "GPL-2.0-only"),
        ('"""Docs."""\n__license__ = "BSD 3-Clause"\n', "BSD-3-Clause"),
        (f"/*\n{APACHE}*/\npackage a;", "Apache-2.0"),
        (f'"""{MIT}"""\nx = 1', "MIT"),
        (f"x = '''\n{MIT}'''", None),  # a program that carries the text is not under it
        ("int x; // see LICENSE", None),
        ("#include <license.h>\n/* MIT License */", None),
    ],
)
def test_headers(text, expected):
    assert licences.from_header(text) == expected


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("package.json", '{"name": "a", "license": "MIT"}', "MIT"),
        ("package.json", '{"licenses": [{"type": "MIT"}, {"type": "Apache 2.0"}]}', "MIT OR Apache-2.0"),
        ("package.json", '{"license": "SEE LICENSE IN x"}', None),
        ("package.json", "[1]", None),
        ("package.json", "{", None),
        ("Cargo.toml", '[package]\nlicense = "MIT/Apache-2.0"\n', "MIT OR Apache-2.0"),
        ("Cargo.toml", '[workspace.package]\nlicense = "ISC"\n', "ISC"),
        ("Cargo.toml", "[package\n", None),
        ("pyproject.toml", '[project]\nlicense = {text = "BSD License"}\n', "BSD-3-Clause"),
        ("pyproject.toml", '[project]\nlicense = {file = "LICENSE"}\nclassifiers = ["License :: OSI'
         ' Approved :: MIT License"]\n', "MIT"),
        ("pyproject.toml", '[tool.poetry]\nlicense = "GPL-3.0-or-later"\n', "GPL-3.0-or-later"),
        ("setup.cfg", "[metadata]\nlicense = Apache License, Version 2.0\n", "Apache-2.0"),
        ("setup.py", "setup(\n    license='BSD',\n)", "BSD-3-Clause"),
        ("setup.py", "setup(classifiers=['License :: OSI Approved :: MIT License'])", "MIT"),
        ("METADATA", "Metadata-Version: 2.4\nLicense-Expression: MIT AND PSF-2.0\n", "MIT AND PSF-2.0"),
        ("PKG-INFO", "License: UNKNOWN\n", None),
        ("pom.xml", "<project><licenses><license><name>The Apache Software License, Version 2.0"
         "</name></license></licenses></project>", "Apache-2.0"),
        ("pom.xml", "<licenses><license><name>Custom</name><url>http://www.apache.org/licenses/"
         "LICENSE-2.0.txt</url></license></licenses>", "Apache-2.0"),
        ("DESCRIPTION", "Package: a\nLicense: GPL-2\n", "GPL-2.0-only"),
        ("a.gemspec", "  s.license = 'MIT'\n", "MIT"),
        ("a.cabal", "license: BSD3\n", "BSD-3-Clause"),
    ],
)  # fmt: skip
def test_metadata(path, text, expected):
    assert licences.is_metadata(path)
    assert licences.of_file(f"some/{path}", text) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [("LICENSE", True), ("a/LICENCE.md", True), ("COPYING.LESSER", True), ("LICENSE-MIT", True), ("UNLICENSE", True),
     ("LICENSES/MIT.txt", True), ("license.py", False), ("LICENSES_bundled.txt", False), ("src/licenses.rs", False),
     ("MIT-LICENSE.txt", True), ("licensing.md", False), ("copyright", True), ("README", False)],
)  # fmt: skip
def test_licence_files(path, expected):
    assert licences.is_licence_file(path) == expected


def test_a_repository_gives_its_licence_to_files_that_state_none():
    files = [
        ("LICENSE-MIT", MIT),
        ("LICENSE-APACHE", "Apache License\nVersion 2.0, January 2004\n"),
        ("Cargo.toml", '[package]\nlicense = "MIT OR Apache-2.0"\n'),
        ("src/lib.rs", "fn main() {}"),
        ("src/gpl.rs", "// SPDX-License-Identifier: GPL-3.0-only\n"),
        ("deps/zlib/LICENSE", ZLIB),
        ("deps/zlib/src/inflate.c", "int x;"),
        ("deps/none/a.c", "int x;"),
    ]
    expected = {
        "LICENSE-MIT": "MIT OR Apache-2.0",
        "LICENSE-APACHE": "MIT OR Apache-2.0",
        "Cargo.toml": "MIT OR Apache-2.0",
        "src/lib.rs": "MIT OR Apache-2.0",
        "src/gpl.rs": "GPL-3.0-only",
        "deps/zlib/LICENSE": "Zlib",
        "deps/zlib/src/inflate.c": "Zlib",
        "deps/none/a.c": "MIT OR Apache-2.0",
    }
    assert licences.of_repository(files) == expected
    assert licences.of_repository(reversed(files)) == expected
    without_metadata = [file for file in files if file[0] != "Cargo.toml"]
    assert licences.of_repository(without_metadata)["src/lib.rs"] == "Apache-2.0 OR MIT"
    assert licences.of_repository([("a.c", "int x;")]) == {"a.c": None}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("MIT", "MIT"), ("mit license", "MIT"), ("The MIT License (MIT)", "MIT"),
        ("Apache 2.0", "Apache-2.0"), ("Apache License, Version 2.0", "Apache-2.0"),
        ("Apache Software License", "Apache-2.0"), ("BSD-3-Clause", "BSD-3-Clause"),
        ("New BSD License", "BSD-3-Clause"), ("2-Clause BSD License", "BSD-2-Clause"),
        ("GPLv3+", "GPL-3.0-or-later"), ("GPL-2.0", "GPL-2.0-only"), ("LGPLv2.1", "LGPL-2.1-only"),
        ("GNU General Public License v3 (GPLv3)", "GPL-3.0-only"),
        ("Mozilla Public License 2.0 (MPL 2.0)", "MPL-2.0"), ("MIT/Apache-2.0", "MIT OR Apache-2.0"),
        ("(MIT OR Apache-2.0) AND ISC", "(MIT OR Apache-2.0) AND ISC"),
        ("mit and (apache-2.0 or isc)", "MIT AND (Apache-2.0 OR ISC)"),
        ("Apache-2.0 WITH LLVM-exception OR MIT", "Apache-2.0 WITH LLVM-exception OR MIT"),
        ("Apache License 2.0 or MIT License", "Apache-2.0 OR MIT"),
        ("UNLICENSED", None), ("Proprietary", None), ("", None), ("((((", None), ("MIT OR", None),
        ("see the file", None),
    ],
)  # fmt: skip
def test_normalize(written, expected):
    assert spdx.normalize(written) == expected


@pytest.mark.parametrize(
    ("expression", "expected"),
    [("MIT", True), ("GPL-2.0-only", False), ("MIT OR GPL-2.0-only", True),
     ("MIT AND GPL-2.0-only", False), ("Apache-2.0 WITH LLVM-exception", True),
     ("GPL-2.0-only WITH Classpath-exception-2.0", False), ("(MIT AND GPL-2.0-only) OR ISC", True),
     ("Something-1.0", False), ("not an expression at all", False), ("CC-BY-NC-4.0", False)],
)  # fmt: skip
def test_permits(expression, expected):
    assert spdx.permits(expression) == expected
    assert spdx.permits(expression, allowed=()) is False


def test_every_name_we_give_is_an_spdx_identifier():
    names = {rule.name for rule in licence_texts._RULES} | set(spdx._CANONICAL.values())
    for name in names:
        assert canonicalize_license_expression(name) == name


def test_phrases_are_written_as_texts_are_compared():
    phrases = {p for rule in licence_texts._RULES for p in (*rule.phrases, *rule.without)}
    for phrase in phrases:
        assert licence_texts.plain(phrase) == f" {phrase} "


EXPRESSIONS = st.recursive(
    st.sampled_from(["MIT", "ISC", "GPL-2.0-only", "Apache-2.0 WITH LLVM-exception", "X-1"]),
    lambda inner: st.builds("({}) {} ({})".format, inner, st.sampled_from(["AND", "OR"]), inner),
    max_leaves=8,
)


@given(EXPRESSIONS)
def test_rendering_keeps_the_meaning(expression):
    tree = spdx.parse(expression)
    rendered = spdx.render(tree)
    assert spdx.render(spdx.parse(rendered)) == rendered
    for allowed in (("MIT",), ("MIT", "Apache-2.0"), ("ISC", "GPL-2.0-only"), spdx.PERMISSIVE):
        assert spdx.permits(rendered, allowed) == spdx.permits(expression, allowed)


@given(st.text(max_size=200))
def test_any_text(text):
    for path in ("a.c", "LICENSE", "package.json", "Cargo.toml", "pom.xml", "setup.cfg"):
        found = licences.of_file(path, text)
        assert found is None or spdx.parse(found)


@pytest.mark.parametrize("unit", ["*", "\n", "license ", "gnu general public license ", "#\n", "under the ",
                                  "mit or ", "this software is ", "(", "licensed under the a b c "])  # fmt: skip
def test_hostile_texts_take_linear_time(unit):
    text = unit * (200_000 // len(unit))
    start = time.process_time()
    licences.of_file("LICENSE", text)
    licences.of_file("setup.cfg", text)
    assert time.process_time() - start < 4
