"""Man pages, package metadata and docstrings as plain text."""

import pytest

from data_beam.io.extract.documents import docstrings, man_page, package_description

MAN = r""".\" comment
.de Sp
hidden macro
..
.ie n \{\
.ds C+ C\v'-.1v'
'br\}
.TH GREP 1 "2024"
.SH NAME
grep \- print lines
.SH "SYNOPSIS AND MORE"
.B grep
.RI [ OPTION ...]
.PP
Use \fB\-i\fR for \(lqignore case\(rq, see
.BR sed (1),
and \f[I]more\f[R]\&.
.TS
table
.TE
.TP
.B \-v
Invert.
"""


def test_man_page():
    assert man_page(MAN) == (
        "NAME\n\ngrep - print lines\n\nSYNOPSIS AND MORE\n\ngrep\n[OPTION...]\n\n"
        'Use -i for "ignore case", see\nsed(1),\nand more.\n\n-v\nInvert.'
    )


def test_package_description():
    assert package_description("Name: x\r\nVersion: 1\r\n\r\n# X\r\n\r\nBody\r\n") == "# X\n\nBody"
    assert package_description("Name: x\n") == ""


SOURCE = '''"""Module text that is long enough to be worth keeping in a corpus of text."""
class A:
    """A class with a docstring that is long enough to be kept, two lines.

        Indented more.
    """
    def f(self, a, *args, b=1, **kw):
        r"""Method text that is long enough to be worth keeping in a corpus. \\d"""
    def g(self):
        """Short."""
'''


def test_docstrings():
    assert docstrings(SOURCE, "pkg.mod") == (
        "pkg.mod\n\nModule text that is long enough to be worth keeping in a corpus of text.\n\n\n"
        "class A\n\nA class with a docstring that is long enough to be kept, two lines.\n\n"
        "Indented more.\n\n\n"
        "A.f(a, *args, b, **kw)\n\n"
        "Method text that is long enough to be worth keeping in a corpus. \\d"
    )


def test_not_python():
    with pytest.raises(SyntaxError):
        docstrings("print 'two'", "old")
