"""An object store for tests: Beam's file system "test://bucket/...", kept in a local folder."""

import os

from apache_beam.io.filesystem import FileMetadata
from apache_beam.io.localfilesystem import LocalFileSystem


class Bucket(LocalFileSystem):
    """Has no folders, lists by prefix. Reading a name that holds `broken` fails after 100 bytes."""

    folder = ""
    broken = ""

    @classmethod
    def scheme(cls):
        return "test"

    def _local(self, path):
        return path.replace("test://bucket", Bucket.folder)

    def join(self, base, *names):
        return "/".join([base.rstrip("/"), *names])

    def split(self, path):
        head, _, tail = path.rpartition("/")
        return head, tail

    def has_dirs(self):
        return False

    def exists(self, path):
        return os.path.isfile(self._local(path))

    def metadata(self, path):
        stat = os.stat(self._local(path))
        return FileMetadata(path, stat.st_size, stat.st_mtime)

    def _list(self, prefix):
        for top, _, names in os.walk(Bucket.folder):
            for name in names:
                path = "test://bucket" + os.path.join(top, name).removeprefix(Bucket.folder)
                if path.startswith(prefix):
                    yield self.metadata(path)

    def open(self, path, mime_type="", compression_type=None):
        handle = open(self._local(path), "rb")  # noqa: SIM115
        return _Broken(handle) if Bucket.broken and Bucket.broken in path else handle


class _Broken:
    def __init__(self, handle):
        self._handle = handle

    def __getattr__(self, name):
        return getattr(self._handle, name)

    def read(self, size=-1):
        data = self._handle.read(size)
        if self._handle.tell() > 100:
            raise OSError("connection reset")
        return data

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._handle.close()
