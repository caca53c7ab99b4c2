"""Weights that took a while to make, kept in the user's cache folder: written whole or not at all, digest-checked.

safetensors reads a file with a flipped bit without complaint, so each kept folder lists the SHA-256 of its files.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from kvpass.errors import InputError

DIGESTS = "SHA256SUMS"


def user_cache() -> Path:
    """``$XDG_CACHE_HOME/kvpass``, or ``~/.cache/kvpass``; not created here."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvpass"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kept_folder(name: str, key: str, build: Callable[[Path], None]) -> Path:
    """The folder of ``name`` and ``key`` in the user's cache, made by ``build(folder)`` if absent or damaged.

    Args:
        name: a word for people who look into the cache folder.
        key: everything that the content depends on; hashed into the folder's name.
        build: fills the empty folder it is given. If it raises, nothing is kept.

    Raises:
        InputError: the cache folder cannot be written.
    """
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    folder = user_cache() / "models" / f"{name}-{digest}"
    if is_intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        reason = f"cannot write to {folder.parent} ({error.strerror}); XDG_CACHE_HOME names another folder"
        raise InputError(reason) from error
    try:
        build(draft)
        _write_digests(draft)
        _publish(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def is_intact(folder: Path) -> bool:
    """Whether every file that the folder's digest list names is there with that content."""
    try:
        lines = (folder / DIGESTS).read_text().splitlines()
        return bool(lines) and all(file_digest(folder / line[66:]) == line[:64] for line in lines)
    except (OSError, UnicodeDecodeError):
        return False


def _write_digests(folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    (folder / DIGESTS).write_text("".join(f"{file_digest(path)}  {path.name}\n" for path in files))


def _publish(draft: Path, folder: Path) -> None:
    """Move ``draft`` to ``folder`` in one step; a damaged folder goes first, another process's good one stays."""
    try:
        draft.rename(folder)
    except OSError:  # somebody is there already, and folders are only replaced when empty
        if is_intact(folder):
            return
        shutil.rmtree(folder)
        draft.rename(folder)
