"""Import statements of each language; against Python's own parser where there is one."""

import ast
import importlib.util
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_beam.code.imports import LANGUAGES, imports


def targets(text: str, lang: str) -> list[str]:
    return [item.target for item in imports(text, lang)]


def test_python():
    text = '''"""import no"""
import a, b.c as d  # import no
from .e import f, g as h
from ..i import (  # comment
    j,
    k as l,
)
from . import *
s = "import no"; import m
if True:
    import n
def f():
    from o import p
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from q import r
try:
    import s
except ImportError:
    s = importlib.import_module("t.u")
from v import \\
    w
class A:
    import x
'''
    found = [(i.target, i.names, i.aliases, i.lazy) for i in imports(text, "python")]
    assert found == [
        ("a", (), ("a",), False),
        ("b.c", (), ("d",), False),
        (".e", ("f", "g"), ("f", "h"), False),
        ("..i", ("j", "k"), ("j", "l"), False),
        (".", ("*",), ("*",), False),
        ("m", (), ("m",), False),
        ("n", (), ("n",), False),
        ("o", ("p",), ("p",), True),
        ("typing", ("TYPE_CHECKING",), ("TYPE_CHECKING",), False),
        ("q", ("r",), ("r",), True),
        ("s", (), ("s",), False),
        ("v", ("w",), ("w",), False),
        ("x", (), ("x",), False),
        ("t.u", (), ("t.u",), True),
    ]


def files_of(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return sorted(Path(spec.submodule_search_locations[0]).rglob("*.py"))


@pytest.mark.parametrize("package", ["flax", "hypothesis", "click", "yaml"])
def test_python_agrees_with_its_parser_on_installed_packages(package):
    files = files_of(package)
    assert len(files) > 10
    for path in files:
        text = path.read_text()
        expected = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                expected |= {(alias.name, "") for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = "." * node.level + (node.module or "")
                expected |= {(base, alias.name) for alias in node.names}
        found = set()
        for item in imports(text, "python"):
            dynamic = item.lazy and f'import_module("{item.target}")' in text.replace("'", '"')
            if not dynamic or (item.target, "") in expected:
                found |= {(item.target, name) for name in item.names or ("",)}
        assert found == expected, path


def test_c():
    text = """/* #include "no.h" */
#include "a/b.h"
  #  include <c.h>
// #include "no.h"
#include_next <d/e.hpp>
#import "F.h"
#include MACRO
const char *s = "#include \\"no.h\\"";
#define X #include "no.h"
"""
    found = [(item.target, item.kind) for item in imports(text, "c")]
    assert found == [("a/b.h", "quoted"), ("c.h", "angle"), ("d/e.hpp", "angle"), ("F.h", "quoted")]


def test_java():
    text = """package a.b;
import c.d.E;  import no.no;
import static f.G.h;
/* import no.no; */
import i.*;
import j . k . L ;
class M { String s = "import no.no;"; // import no.no;
}"""
    assert [(item.target, item.kind) for item in imports(text, "java")] == [
        ("c.d.E", ""), ("f.G.h", "static"), ("i.*", ""), ("j.k.L", ""),
    ]  # fmt: skip


def test_javascript():
    text = """// import no from 'no'
import a from './a';
import { b, type c as d } from "b";
import * as e from 'e'
import 'side';
import type { F } from './f';
import g, {
  h,
} from './gh.js';
export { i as j } from './i';
export * from './k';
export * as l from './l'
export const x = "from 'no'";
const m = require('m');
function f() { return require("no" + x) || import('./dynamic'); }
  const n = require('./lazy');
const s = `import o from 'no'`;
object.import('no'); my_require('no');
/// <reference path="types.d.ts" />
"""
    found = [(i.target, i.kind, i.names, i.lazy) for i in imports(text, "typescript")]
    assert found == [
        ("./a", "import", (), False),
        ("b", "import", ("b", "c"), False),
        ("e", "import", ("*",), False),
        ("side", "import", (), False),
        ("./f", "import", ("F",), True),
        ("./gh.js", "import", ("h",), False),
        ("./i", "export", ("i",), False),
        ("./k", "export", ("*",), False),
        ("./l", "export", ("*",), False),
        ("m", "require", (), False),
        ("no", "require", (), False),  # of an expression: its first string
        ("./dynamic", "require", (), True),
        ("./lazy", "require", (), True),
        ("types.d.ts", "reference", (), False),
    ]


def test_go():
    text = """package a
// import "no"
import "fmt"
import (
	"example.com/m/b" // note
	c2 "example.com/m/c"
	_ `example.com/side`
	. "dot"
	/* "no" */
	"example.com/lib/v2"
)
var s = `
import "no"
`
"""
    assert [(item.target, item.aliases) for item in imports(text, "go")] == [
        ("fmt", ("fmt",)), ("example.com/m/b", ("b",)), ("example.com/m/c", ("c2",)),
        ("example.com/side", ("_",)), ("dot", (".",)), ("example.com/lib/v2", ("lib",)),
    ]  # fmt: skip


def test_rust():
    text = """//! use no::no;
mod a;
pub(crate) mod b;
#[path = "other/c.rs"]
mod c;
mod inline {
    use super::d;
    use super::super::e;
}
use crate::f::{self, g as G, h::{i, j::*}};
pub use self::k::L;
extern crate m;
fn x() { let s = "use no::no;"; crate::n::o(); super::p::Q; }
include!("q.rs");
macro_rules! r { () => { $crate::no::no } }
"""
    found = [
        (i.target, i.kind, i.aliases[0] if i.aliases else "", i.lazy) for i in imports(text, "rust")
    ]
    assert found == [
        ("a", "mod", "", False),
        ("b", "mod", "", False),
        ("other/c.rs", "path", "", False),
        ("super::e", "use", "e", True),  # of the module around: the one inside is this file
        ("crate::f", "use", "f", False),
        ("crate::f::g", "use", "G", False),
        ("crate::f::h::i", "use", "i", False),
        ("crate::f::h::j::*", "use", "*", False),
        ("self::k::L", "pub use", "L", False),
        ("m", "crate", "", False),
        ("crate::n::o", "use", "", True),
        ("super::p::Q", "use", "", True),
        ("q.rs", "include", "", False),
    ]


@given(st.text(max_size=300), st.sampled_from(sorted(LANGUAGES)))
def test_any_text(text, lang):
    for item in imports(text, lang):
        assert item.target and "\n" not in item.target
    assert imports(text, "cobol") == []


@pytest.mark.parametrize("lang", ["python", "c++", "java", "typescript", "go", "rust"])
@pytest.mark.parametrize(
    "unit",
    ["import ", "import(", "from a import (", "use a::{", "#include ", "export {", "import {\n", "  ",
     "import a.", "\n", "import '", "crate::", "if x:\n import a\n ", "mod a", "export * as ", "\nuse a::{", "\n#[path=\"a\"]", "import x from "],
)  # fmt: skip
def test_hostile_texts_take_linear_time(lang, unit):
    text = unit * (200_000 // len(unit))
    start = time.process_time()
    imports(text, lang)
    assert time.process_time() - start < 3
