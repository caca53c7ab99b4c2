"""Kept weights: built once, never half written, rebuilt when a bit has changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpass.errors import InputError
from kvpass.weights import DIGESTS, is_intact, kept_folder


class Build:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "weights").write_bytes(bytes(range(256)))


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Build()


def test_built_once_per_key(build: Build) -> None:
    first = kept_folder("model", "a", build)
    assert kept_folder("model", "a", build) == first
    assert build.calls == 1
    assert kept_folder("model", "b", build) != first
    assert build.calls == 2


def test_a_flipped_bit_is_found(build: Build) -> None:
    folder = kept_folder("model", "a", build)
    content = bytearray((folder / "weights").read_bytes())
    content[100] ^= 1
    (folder / "weights").write_bytes(content)
    assert not is_intact(folder)
    assert kept_folder("model", "a", build) == folder
    assert build.calls == 2
    assert is_intact(folder)


@pytest.mark.parametrize("lost", ["weights", DIGESTS])
def test_a_lost_file_is_found(build: Build, lost: str) -> None:
    folder = kept_folder("model", "a", build)
    (folder / lost).unlink()
    kept_folder("model", "a", build)
    assert build.calls == 2


def test_a_digest_list_that_is_no_text_is_found(build: Build) -> None:
    folder = kept_folder("model", "a", build)
    (folder / DIGESTS).write_bytes(b"\xff\xfe")
    assert not is_intact(folder)


def test_a_build_that_fails_keeps_nothing(build: Build, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        build(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept_folder("model", "a", fail)
    assert list((tmp_path / "kvpass" / "models").iterdir()) == []


def test_another_process_may_win(build: Build) -> None:
    def slow(folder: Path) -> None:
        kept_folder("model", "a", build)  # the other process, while this one builds
        (folder / "weights").write_bytes(b"mine")

    folder = kept_folder("model", "a", slow)
    assert (folder / "weights").read_bytes() == bytes(range(256))


def test_a_folder_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, build: Build) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="XDG_CACHE_HOME"):
        kept_folder("model", "a", build)
