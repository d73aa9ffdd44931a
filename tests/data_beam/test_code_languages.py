"""Names, contents of ambiguous files, first lines; what is documentation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_beam.code.languages import (
    DATA_LANGUAGES,
    EXTENSIONS,
    fence_tag,
    is_documentation,
    language,
)
from data_beam.code.lexing import known


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("src/a.py", "python"), ("A.PY", "python"), ("a/Makefile", "make"), ("Dockerfile", "docker"),
        ("Dockerfile.dev", "docker"), ("CMakeLists.txt", "cmake"), ("x.tsx", "typescript"),
        ("config.h.in", "c"), ("go.mod", "go module"), ("requirements-dev.txt", "requirements"),
        ("x.ipynb", "notebook"), ("README.md", None), ("notes.txt", None), ("x.png", None), ("", None),
        ("a.b/c", None), ("lib.h", "c"), ("x.m", "matlab"), ("x.v", "verilog"), ("x.pl", "perl"),
    ],
)  # fmt: skip
def test_by_name(path, expected):
    assert language(path) == expected


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("a.h", "#ifndef A_H\nint f(void);\n#endif\n", "c"),
        ("a.h", '/* class A {} */ // std::x\n#ifdef __cplusplus\nextern "C" {\n#endif\n', "c"),
        ("a.h", "namespace a {\nclass B;\n}", "c++"),
        ("a.h", "#include <vector>\n", "c++"),
        ("a.h", "template <typename T>\nT f(T x);", "c++"),
        (
            "a.h",
            "#import <Foundation/Foundation.h>\n@interface A : NSObject\n@end\n",
            "objective-c",
        ),
        ("a.h", "// -*- C++ -*-\n#define X\n", "c++"),
        ("a.m", '#import "A.h"\n@implementation A\n@end\n', "objective-c"),
        ("a.m", "function y = f(x)\n% doc\ny = x';\nend\n", "matlab"),
        ("a.m", "(* Mathematica *)\nf[x_] := Module[{y}, x]\n", "mathematica"),
        ("a.pl", "use strict;\nmy $x = 1;\n", "perl"),
        ("a.pl", "#!/usr/bin/perl\nprint 1;\n", "perl"),
        ("a.pl", ":- module(a, [f/1]).\nf(X) :- g(X).\n", "prolog"),
        ("a.v", "module top(input clk);\nalways @(posedge clk) q <= d;\nendmodule\n", "verilog"),
        ("a.v", "Require Import List.\nTheorem t : True.\nProof. Qed.\n", "coq"),
        ("a.v", "module main\nimport os\nfn main() {\n}\n", "vlang"),
        ("a.ts", "export const a: number = 1;\n", "typescript"),
        ("a.ts", '<?xml version="1.0"?>\n<!DOCTYPE TS>\n<TS version="2.1">', "qt translation"),
        ("a.d", "obj/a.o: a.c a.h\n", "make"),
        ("a.d", "module a;\nimport std.stdio;\n", "d"),
        ("a.pp", "unit a;\ninterface\n", "pascal"),
        ("a.pp", "class a { package { 'b': } }", "puppet"),
        ("run", "#!/usr/bin/env python3\n", "python"),
        ("run", "#!/usr/bin/env -S node --x\n", "javascript"),
        ("run", "#!/bin/bash -e\n", "shell"),
        ("run", "#! /usr/local/bin/ruby2.7\n", "ruby"),
        ("run", "# vim: set ft=perl :\n", "perl"),
        ("run", "hello\n", None),
        ("x.unknown", "#!/bin/sh\n", None),
    ],
)
def test_by_content(path, text, expected):
    assert language(path, text) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("README", True), ("README.zh-CN.md", True), ("a/readme.txt", True), ("docs/guide.txt", True),
        ("docs/x/y.rst", True), ("src/notes.md", True), ("CHANGELOG", True), ("INSTALL", True),
        ("src/words.txt", False), ("requirements.txt", False), ("docs/requirements.txt", False),
        ("CMakeLists.txt", False), ("docs/conf.py", False), ("docs/logo.svg", False),
        ("Makefile", False), ("docs/Makefile", False), ("data", False), ("LICENSE.md", False),
        ("docs/COPYING.txt", False),
    ],
)  # fmt: skip
def test_documentation(path, expected):
    assert is_documentation(path) == expected


def test_the_table_is_lower_case_and_programs_have_known_comments():
    assert all(extension == extension.lower() for extension in EXTENSIONS)
    without = {"graphql", "hcl", "json", "notebook"}  # `known` covers the rest of the programs
    unknown = {lang for lang in EXTENSIONS.values() if not known(lang)} - DATA_LANGUAGES - without
    assert unknown <= {"basic"}


def test_fence_tags_are_single_words():
    for lang in set(EXTENSIONS.values()) | {"und", ""}:
        assert " " not in fence_tag(lang)
    assert fence_tag("c++") == "cpp"
    assert fence_tag("python") == "python"


@given(st.sampled_from(sorted(EXTENSIONS)), st.text(max_size=200))
def test_any_content_has_a_language(extension, text):
    found = language(f"a{extension}", text)
    assert found is None or found == found.lower()
