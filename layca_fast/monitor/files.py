"""Replacing a file as a whole: what was there stays until the new one is complete."""

import os
from contextlib import suppress
from pathlib import Path


def replace(path: Path, data: bytes) -> None:
    """Make ``data`` the contents of ``path``, or raise OSError and leave there what was there."""
    target = path.resolve()
    if target.exists() and not target.is_file():
        # A pipe, or /dev/stdout: nothing to lose there, and nothing that could take its place.
        with target.open("wb") as file:
            file.write(data)
        return
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        _write(beside, data)
        if target.exists():
            beside.chmod(target.stat().st_mode & 0o777)
        beside.replace(target)
    except PermissionError:
        # The file may be writable in a folder that is not.
        if not target.is_file():
            raise
        _overwrite(target, data)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _overwrite(path: Path, data: bytes) -> None:
    before = path.read_bytes()
    try:
        path.write_bytes(data)
    except OSError:
        # The memory of the file is its own still.
        with suppress(OSError):
            path.write_bytes(before)
        raise
