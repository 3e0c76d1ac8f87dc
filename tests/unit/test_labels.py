"""Labels of SELinux: who gets one, and what is made of a program that answers oddly."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Any, cast

import pytest

from ouassister.errors import UnsupportedGuestError
from ouassister.model import Entry, Expected, Kind
from ouassister.shadow import labels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ouassister.shadow.session import Shadow

BIN = "system_u:object_r:bin_t:s0"
FOLDER = Expected(1, stat.S_IFDIR | 0o755, 4096, 5, 6)
FILE = Expected(2, stat.S_IFREG | 0o644, 3, 5, 6)


class Answering:
    """A shadow in which one program answers as it was told to."""

    def __init__(self, folder: Path, answer: Callable[[list[str]], str], status: int = 0) -> None:
        self._folder = folder
        self._answer = answer
        self._status = status
        self.calls: list[list[str]] = []

    def run(self, argv: Sequence[str], *, output: str, **_: Any) -> int:  # noqa: ANN401
        self.calls.append(list(argv))
        paths = list(argv[list(argv).index("--") + 1 :])
        self.output_path(output).write_text(self._answer(paths), errors="surrogateescape")
        return self._status

    def output_path(self, name: str) -> Path:
        return self._folder / name


def label(shadow: Answering, *entries: Entry) -> dict[bytes, tuple[tuple[str, bytes], ...]]:
    found = labels.label(cast("Shadow", shadow), entries)
    assert [one.path for one in found] == [one.path for one in entries]
    return {one.path: one.xattrs for one in found}


def all_alike(paths: list[str]) -> str:
    return f"{BIN}\n" * len(paths)


def test_what_is_made_gets_a_label_and_what_stays_keeps_its_own(tmp_path: Path) -> None:
    shadow = Answering(tmp_path, all_alike)
    capability = ("security.capability", b"c")
    found = label(
        shadow,
        Entry(b"/a", Kind.DIRECTORY, FOLDER),
        Entry(b"/a/new", Kind.DIRECTORY, None),
        Entry(b"/a/turned", Kind.DIRECTORY, FILE),
        Entry(b"/a/f\xff", Kind.FILE, FILE, xattrs=(capability, ("user.z", b"z"))),
        Entry(b"/a/gone", Kind.DELETE, FILE),
        Entry(b"/a/link", Kind.SYMLINK, None, target=b"f"),
        Entry(b"/a/other", Kind.HARDLINK, None, target=b"/a/f\xff"),
        Entry(b"/a/time", Kind.FILE, FILE, same=True),
    )
    mark = (labels.XATTR, BIN.encode() + b"\0")
    assert found == {
        b"/a": (),
        b"/a/new": (mark,),
        b"/a/turned": (mark,),
        b"/a/f\xff": (capability, mark, ("user.z", b"z")),
        b"/a/gone": (),
        b"/a/link": (mark,),
        b"/a/other": (),
        b"/a/time": (),
    }
    assert shadow.calls == [
        ["matchpathcon", "-n", "-N", "-m", "file", "--", "/a/f\udcff"],
        ["matchpathcon", "-n", "-N", "-m", "dir", "--", "/a/new", "/a/turned"],
        ["matchpathcon", "-n", "-N", "-m", "lnk_file", "--", "/a/link"],
    ]


def test_what_the_policy_leaves_to_the_kernel_gets_none(tmp_path: Path) -> None:
    shadow = Answering(tmp_path, lambda paths: "<<none>>\n" * len(paths))
    assert label(shadow, Entry(b"/proc/x", Kind.FILE, None)) == {b"/proc/x": ()}


def test_many_paths_are_asked_in_parts_that_a_program_takes(tmp_path: Path) -> None:
    shadow = Answering(tmp_path, lambda paths: "".join(f"u:r:{len(one)}_t\n" for one in paths))
    entries = [
        Entry(b"/" + b"d/" * (number % 900) + b"f", Kind.FILE, None) for number in range(900)
    ]
    found = labels.label(cast("Shadow", shadow), entries)
    assert len(shadow.calls) > 5
    assert max(sum(map(len, call)) for call in shadow.calls) < 140 << 10
    assert all(one.xattrs == ((labels.XATTR, b"u:r:%d_t\0" % len(one.path)),) for one in found)


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ("", 127),
        (f"{BIN}\n", 1),
        ("", 0),
        (f"{BIN}\n{BIN}\n", 0),
        ("two words\n", 0),
        (f"{BIN}\x1b[31m\n", 0),
        ("x" * 5000 + "\n", 0),
        ("matchpathcon(/etc/passwd) failed: \udcff\n", 1),
    ],
)
def test_guest_that_does_not_tell_labels_is_refused(
    tmp_path: Path, answer: str, status: int
) -> None:
    shadow = cast("Shadow", Answering(tmp_path, lambda _: answer, status))
    with pytest.raises(UnsupportedGuestError, match="SELinux policy, and does not tell") as caught:
        labels.require(shadow)
    assert "selinux-utils" in caught.value.hint


@pytest.mark.parametrize(
    ("path", "is_one"),
    [
        (b"/etc/selinux/default/policy/policy.33", True),
        (b"/etc/selinux/default/contexts/files/file_contexts", False),
        (b"/etc/selinux/a/b/policy/policy.33", False),
    ],
)
def test_a_policy_is_known_by_its_path(path: bytes, is_one: bool) -> None:
    assert bool(labels.POLICY.fullmatch(path)) == is_one
