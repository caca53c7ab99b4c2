"""Where a command's text goes: to the terminal, or whole into a file."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from kvpass.errors import InputError


def deliver(text: str, path: str | None) -> None:
    """Print the text, or put it in a file that holds either all of it or what it held before.

    Raises:
        InputError: the file cannot be written.
    """
    if path is None or path == "-":
        sys.stdout.write(text + "\n")
        return
    try:
        _replace(Path(path), text + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _replace(target: Path, text: str) -> None:
    if target.is_dir():
        raise IsADirectoryError(21, "it is a folder")
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, mode)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
