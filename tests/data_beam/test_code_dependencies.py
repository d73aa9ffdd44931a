"""Edges between the files of small repositories, one per language, with every kind of import."""

import ast
import gc
import importlib.util
import sys
import time
import weakref
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_beam.code.dependencies import resolve
from data_beam.code.languages import language


def edges(files: dict[str, str], hard_only: bool = False) -> set[tuple[str, str]]:
    found = resolve((path, language(path, text) or "und", text) for path, text in files.items())
    assert found.keys() == files.keys()
    return {
        (path, other)
        for path, needed in found.items()
        for other, hard in needed.items()
        if hard or not hard_only
    }


def hard_and_soft(files: dict[str, str]) -> tuple[set, set]:
    hard = edges(files, hard_only=True)
    return hard, edges(files) - hard


# --- Python ---

PYTHON = {
    "src/shop/__init__.py": "from .cart import Cart as Basket\nfrom . import price\nfrom .tax import *\nVERSION = 1\n",
    "src/shop/cart.py": "from shop.price import total\nfrom shop import VERSION, Basket\nimport json\n",
    "src/shop/price.py": "def total(x):\n    from .cart import Cart\n",
    "src/shop/tax/__init__.py": "from .rates import RATE\n",
    "src/shop/tax/rates.py": "import shop.tax\nRATE = 2\n",
    "tests/test_shop.py": "import shop\nfrom shop import Basket, price, RATE\nimport helper\n",
    "tests/helper.py": "import logging\nfrom shop.nothing import x\n",
    "tests/logging.py": "",
    "json.py": "",
    "setup.py": "from setuptools import setup\n",
}  # fmt: skip


def test_python():
    shop = "src/shop"
    hard, soft = hard_and_soft(PYTHON)
    assert hard == {
        (f"{shop}/__init__.py", f"{shop}/cart.py"),
        (f"{shop}/__init__.py", f"{shop}/price.py"),
        (f"{shop}/__init__.py", f"{shop}/tax/__init__.py"),
        (f"{shop}/cart.py", f"{shop}/price.py"),
        (f"{shop}/tax/__init__.py", f"{shop}/tax/rates.py"),
        ("tests/test_shop.py", f"{shop}/__init__.py"),  # import shop
        ("tests/test_shop.py", f"{shop}/cart.py"),  # Basket, passed on under another name
        ("tests/test_shop.py", f"{shop}/price.py"),  # a submodule
        ("tests/test_shop.py", f"{shop}/tax/rates.py"),  # RATE, through two stars and names
        ("tests/test_shop.py", "tests/helper.py"),
    }
    # VERSION is defined in the __init__ around cart; price imports cart inside a function.
    assert soft == {
        (f"{shop}/cart.py", f"{shop}/__init__.py"),
        (f"{shop}/price.py", f"{shop}/cart.py"),
    }


def test_python_in_a_folder_that_is_the_package():
    files = {
        "__init__.py": "",
        "a.py": "from pack.b import c\nimport pack.d as d\nfrom pack import e\n",
        "b.py": "import io\n", "d.py": "", "e/__init__.py": "import io\n", "io.py": "",
    }  # fmt: skip
    assert edges(files) == {("a.py", "b.py"), ("a.py", "d.py"), ("a.py", "e/__init__.py")}


def test_names_of_the_standard_library_mean_it_except_in_copies_of_it():
    names = sorted(sys.stdlib_module_names)[:30]
    files = {f"Lib/{name}.py": "" for name in names} | {"Lib/user.py": f"import {names[0]}\n"}
    assert edges(files) == {("Lib/user.py", f"Lib/{names[0]}.py")}
    assert not edges({"src/io.py": "", "src/json.py": "", "src/user.py": "import io, json\n"})


def test_python_prefers_the_package_at_hand():
    files = {
        "one/pkg/__init__.py": "", "one/pkg/util.py": "", "one/pkg/main.py": "import pkg.util\n",
        "two/pkg/__init__.py": "", "two/pkg/util.py": "", "two/pkg/main.py": "from pkg import util\n",
        "script.py": "import pkg.util\n",
    }  # fmt: skip
    assert edges(files) == {
        ("one/pkg/main.py", "one/pkg/util.py"),
        ("two/pkg/main.py", "two/pkg/util.py"),
        ("script.py", "one/pkg/util.py"),
    }


@pytest.mark.parametrize("package", ["flax", "hypothesis"])
def test_python_against_an_installed_package(package):
    """Modules that `from pack.a.b import c` names by their whole path are found, and a hard edge
    leads nowhere that no import of the file mentions."""
    spec = importlib.util.find_spec(package)
    root = Path(spec.submodule_search_locations[0])
    files = {
        f"{package}/{path.relative_to(root).as_posix()}": path.read_text()
        for path in sorted(root.rglob("*.py"))
    }
    found = resolve((path, "python", text) for path, text in files.items())
    modules = {path.removesuffix(".py").replace("/", "."): path for path in files}
    wanted = 0
    for path, text in files.items():
        mentioned = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                mentioned |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
                if node.module in modules and modules[node.module] != path:
                    wanted += 1
                    assert modules[node.module] in found[path]
            elif isinstance(node, ast.Import):
                mentioned |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                package_of = path.removesuffix(".py").split("/")[: -node.level]
                base = ".".join([*package_of, *([node.module] if node.module else [])])
                mentioned |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        for other, hard in found[path].items():
            name = other.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            through = any(
                name.startswith(f"{said}.") for said in mentioned
            )  # an __init__ passes on
            assert not hard or name in mentioned or through, (path, other)
    assert wanted > 50


# --- C and C++ ---


def test_c_and_cpp():
    files = {
        "include/lib/core.h": "#include <stdio.h>\n#include <lib/util.hpp>\n",
        "include/lib/util.hpp": "#include <vector>\n",
        "include/string.h": "",
        "src/core.c": '#include "lib/core.h"\n#include "local.h"\n#include "../gen/tables.inc"\n#include <string.h>\n',
        "src/local.h": "",
        "other/local.h": "",
        "gen/tables.inc": "int t[] = {1};",
        "test/core_test.cc": '#include "local.h"\n#include "core.h"\n#include "missing.h"\n',
    }
    assert edges(files) == {
        ("include/lib/core.h", "include/lib/util.hpp"),
        ("src/core.c", "include/lib/core.h"),
        ("src/core.c", "src/local.h"),
        ("src/core.c", "gen/tables.inc"),
        ("test/core_test.cc", "other/local.h"),  # neither is nearer: the alphabet
        ("test/core_test.cc", "include/lib/core.h"),
    }


# --- Java ---


def test_java():
    base = "src/main/java/org/ex"
    files = {
        f"{base}/Main.java": "package org.ex;\nimport org.ex.util.*;\nimport static org.ex.Names.HELLO;\n"
        "import java.util.List;\nclass Main extends Base { Strings s; Helper h; /* Unused */ }",
        f"{base}/Base.java": "package org.ex;\nimport org.ex.util.Strings.Inner;\nclass Base { Main m; }",
        f"{base}/Helper.java": "package org.ex;\nclass Helper { List l; Object x = other.Names; }",
        f"{base}/List.java": "package org.ex;\nclass List {}",
        f"{base}/Names.java": "package org.ex;\nclass Names { static String HELLO; }",
        f"{base}/Unused.java": "package org.ex;\nclass Unused {}",
        f"{base}/util/Strings.java": "package org.ex.util;\nclass Strings { static class Inner {} }",
        f"{base}/util/Maps.java": "package org.ex.util;\nclass Maps {}",
    }
    hard, soft = hard_and_soft(files)
    assert hard == {
        (f"{base}/Main.java", f"{base}/util/Strings.java"),
        (f"{base}/Main.java", f"{base}/Names.java"),
        (f"{base}/Main.java", f"{base}/Base.java"),  # extends
        (f"{base}/Base.java", f"{base}/util/Strings.java"),
    }
    assert soft == {
        (f"{base}/Main.java", f"{base}/Helper.java"),
        (f"{base}/Base.java", f"{base}/Main.java"),
        (f"{base}/Helper.java", f"{base}/List.java"),
    }


# --- JavaScript and TypeScript ---


def test_javascript():
    files = {
        "package.json": '{"name": "root"}',
        "packages/core/package.json": '{"name": "@x/core", "main": "dist/index.js"}',
        "packages/core/src/index.ts": "export { make } from './make';\nexport * from './types'\n",
        "packages/core/src/make.ts": "import { T } from '.';\nimport { U } from './index.js'\n",
        "packages/core/src/types.ts": "export interface T {}\nexport type U = T\n",
        "app/main.tsx": "import { make } from '@x/core';\nimport View from './view';\nimport '@x/core/types'\n"
        "import data from '../data/a.json';\nimport('./lazy.js');\nimport react from 'react'\n",
        "app/view/index.jsx": "const u = require('../../lib/util');\nimport x from '@/shared'\n",
        "app/lazy.mjs": "", "app/lazy.ts": "",
        "lib/util.js": "", "data/a.json": "{}", "src/shared.js": "",
    }  # fmt: skip
    core = "packages/core/src"
    hard, soft = hard_and_soft(files)
    assert hard == {
        (f"{core}/index.ts", f"{core}/make.ts"),
        (f"{core}/index.ts", f"{core}/types.ts"),
        (f"{core}/make.ts", f"{core}/types.ts"),  # through the index above, not to it
        ("app/main.tsx", f"{core}/index.ts"),
        ("app/main.tsx", f"{core}/types.ts"),
        ("app/main.tsx", "app/view/index.jsx"),
        ("app/main.tsx", "data/a.json"),
        ("app/view/index.jsx", "lib/util.js"),
        ("app/view/index.jsx", "src/shared.js"),
    }
    assert soft == {("app/main.tsx", "app/lazy.ts")}


ALIASES = {
    "tsconfig.base.json": """{ // "paths": {"@ui/*": ["nowhere/*"]}
        "compilerOptions": {"baseUrl": ".", "paths": {
            "@ui/*": ["packages/ui/src/*", "packages/ui/*"], "@ui/theme": ["packages/dark.ts"],
            "config": ["settings/index.ts"], /* "a": [], */
        },},
    }""",
    "packages/web/tsconfig.json": '{"extends": "../../tsconfig.base.json"}',
    "packages/web/main.ts": (
        'import a from "@ui/button";\nimport b from "@ui/theme";\nimport c from "config";\n'
        'import d from "packages/ui/lost";\nimport e from "react";\nimport f from "@ui/old";\n'
    ),
    "packages/ui/src/button.tsx": "",
    "packages/ui/old.js": 'import x from "@ui/button";\n',  # no configuration above it
    "packages/ui/lost.ts": "",
    "packages/dark.ts": "",
    "settings/index.ts": "",
    "nowhere/button.ts": "",
    "app/jsconfig.json": '{"compilerOptions": {"paths": {"#/*": ["./src/*"]}}}',
    "app/main.js": 'import x from "#/deep/one";\nimport y from "#/../../settings/index";\n',
    "app/src/deep/one.js": 'import("#/two");\n',
    "app/src/two.js": "",
    "bad/tsconfig.json": '{"extends": 3, "compilerOptions": {"paths": [], "baseUrl": 1}}',
    "bad/a.ts": 'import b from "./b";\n',
    "bad/b.ts": "",
    "round/tsconfig.json": '{"extends": "./tsconfig.json"}',
    "round/a.ts": 'import b from "./b";\n',
    "round/b.ts": "",
}


def test_aliases_of_tsconfig():
    web, ui = "packages/web/main.ts", "packages/ui"
    assert edges(ALIASES) == {
        (web, f"{ui}/src/button.tsx"), (web, "packages/dark.ts"), (web, "settings/index.ts"),
        (web, f"{ui}/lost.ts"), (web, f"{ui}/old.js"),
        ("app/main.js", "app/src/deep/one.js"), ("app/main.js", "settings/index.ts"),
        ("app/src/deep/one.js", "app/src/two.js"),
        ("bad/a.ts", "bad/b.ts"), ("round/a.ts", "round/b.ts"),
    }  # fmt: skip


# --- Go ---


def test_go():
    files = {
        "go.mod": "module example.com/m\n\ngo 1.21\n",
        "main.go": 'package main\n\nimport (\n\t"fmt"\n\tst "example.com/m/store"\n)\n\nfunc main() { fmt.Println(st.Open()) }\n',
        "store/open.go": "package store\n\nfunc Open() *DB { return newDB() }\n",
        "store/db.go": "package store\n\nimport _ \"example.com/m/store/driver\"\n\ntype DB struct{}\n\nfunc newDB() *DB { return nil }\n",
        "store/db_test.go": "package store\n\nfunc TestDB() { newDB() }\n",
        "store/consts.go": "package store\n\nconst (\n\tmaxSize = 10\n\tOther = 2\n)\n",
        "store/driver/driver.go": "package driver\n\nfunc init() { open := 1; _ = open }\n",
        "tools/x.go": 'package tools\n\nimport "example.com/other/store"\n',
    }  # fmt: skip
    hard, soft = hard_and_soft(files)
    assert hard == {("main.go", "store/open.go"), ("store/db.go", "store/driver/driver.go")}
    assert soft == {("store/open.go", "store/db.go"), ("store/db_test.go", "store/db.go")}
    del files["go.mod"]
    assert ("main.go", "store/open.go") in edges(files)  # by the end of the import path


# --- Rust ---


def test_rust():
    files = {
        "Cargo.toml": '[workspace]\nmembers = ["core-lib", "app"]\n',
        "core-lib/Cargo.toml": '[package]\nname = "core-lib"\n',
        "core-lib/src/lib.rs": "mod a;\npub mod b;\npub use b::deep::Thing;\npub struct Top;\n",
        "core-lib/src/a.rs": "use crate::b::{self, Item};\nuse super::Top;\nuse crate::Thing;\nmod inner;\n",
        "core-lib/src/a/inner.rs": "use super::super::b;\nuse std::io;\n",
        "core-lib/src/b/mod.rs": "pub mod deep;\npub struct Item;\n",
        "core-lib/src/b/deep.rs": "pub struct Thing;\n#[cfg(test)]\nmod tests {\n    use super::*;\n}\n",
        "app/Cargo.toml": '[package]\nname = "app"\n',
        "app/src/main.rs": 'use core_lib::Thing;\n#[path = "odd/name.rs"]\nmod named;\nfn f() { core_lib::b::g(); }\n',
        "app/src/odd/name.rs": "",
        "app/tests/it.rs": "mod common;\nuse core_lib::b::Item;\n",
        "app/tests/common/mod.rs": "",
    }  # fmt: skip
    core = "core-lib/src"
    hard, soft = hard_and_soft(files)
    assert hard == {
        (f"{core}/lib.rs", f"{core}/a.rs"),
        (f"{core}/lib.rs", f"{core}/b/mod.rs"),
        (f"{core}/lib.rs", f"{core}/b/deep.rs"),  # pub use
        (f"{core}/a.rs", f"{core}/a/inner.rs"),
        (f"{core}/a.rs", f"{core}/b/mod.rs"),
        (f"{core}/a.rs", f"{core}/b/deep.rs"),  # crate::Thing, passed on by lib.rs
        (f"{core}/a/inner.rs", f"{core}/b/mod.rs"),
        (f"{core}/b/mod.rs", f"{core}/b/deep.rs"),
        ("app/src/main.rs", f"{core}/b/deep.rs"),
        ("app/src/main.rs", "app/src/odd/name.rs"),
        ("app/tests/it.rs", "app/tests/common/mod.rs"),
        ("app/tests/it.rs", f"{core}/b/mod.rs"),
    }
    assert soft == {(f"{core}/a.rs", f"{core}/lib.rs")}  # Top is defined in the parent


# --- Any repository ---

NAMES = st.sampled_from(
    ["a", "b/__init__", "b/c", "index", "x/index", "x/y", "src/lib", "src/m/mod", "mod", "main"]
)
ENDINGS = st.sampled_from([".py", ".c", ".h", ".java", ".js", ".ts", ".go", ".rs", ".json"])
LINES = st.sampled_from(
    ["from . import *", "from .. import a", "import b.c", "from b import c", '#include "../b/c.h"',
     "package p;", "import p.*;", "import p.A;", "import {a} from '..'", "export * from './index'",
     "require('../../../x')", 'import "m/x"', "package a", "mod m;", "use super::super::x;",
     "use crate::*;", "pub use self::*;", "class A extends A {}", "{", "\x00", "from b import *"]
)  # fmt: skip


@given(
    st.dictionaries(st.builds(str.__add__, NAMES, ENDINGS), st.lists(LINES, max_size=6), max_size=8)
)
def test_edges_lead_to_other_files_whatever_the_files_hold(lines):
    files = {path: "\n".join(some) for path, some in lines.items()}
    found = edges(files)
    assert all(path != other and other in files for path, other in found)
    assert edges(dict(reversed(files.items()))) == found


@pytest.mark.parametrize(
    ("path", "unit"),
    [("a.py", "x: y\n"), ("a.go", "\nvar (\n"), ("a.go", "\nvar (\n\tx\n)"), ("A.java", "extends "), ("a.ts", "export class "),
     ("a.rs", "pub use a::*;\n"), ("a.rs", "pub use self::*;\n"), ("a.py", "from . import *\n"), ("index.js", "export * from '.';\n")],
)  # fmt: skip
def test_hostile_texts_take_linear_time(path, unit):
    other = {
        "B.java": "class B {}",
        "b.rs": "use super::x;",
        "b.py": "from . import y",
        "b.js": "import {z} from '.'",
    }
    start = time.process_time()
    edges({path: unit * (100_000 // len(unit)), **other})
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("path", "line"),
    [("p/m{}/__init__.py", "from p.m{} import *\n"), ("m{}/index.js", "export * from '../m{}';\n"),
     ("src/m{}.rs", "pub use crate::m{}::*;\n")],
)  # fmt: skip
def test_re_exports_that_fan_out_take_polynomial_time(path, line):
    everything = "".join(line.format(n) for n in range(25))
    files = {path.format(n): everything for n in range(25)}
    files |= {
        "p/user.py": "from p.m0 import missing\n",
        "m0/user.js": "import {missing} from '.';\n",
        "src/user.rs": "use crate::m0::missing;\n",
    }
    start = time.process_time()
    edges(files)
    assert time.process_time() - start < 5


def test_nothing_of_a_repository_is_kept():
    class Text(str):
        pass

    kept = []
    for path in ("a.py", "a.c", "A.java", "a.ts", "a.go", "a.rs"):
        text = Text("import a\n")
        kept.append(weakref.ref(text))
        resolve([(path, language(path), text), ("x/" + path, language(path), "package a")])
    del text
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(kept)
