"""Plain text out of what wraps it: man pages, package metadata, docstrings (`documents`), web pages
(`web`)."""

from data_beam.io.extract.documents import docstrings, man_page, package_description

__all__ = ["docstrings", "man_page", "package_description"]
