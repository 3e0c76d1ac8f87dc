"""Extraction of one thing each: what is dropped, deleted, refused; and the program's manners."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests.host.extract_inside import ACL, CAPABILITY
from tests.host.extract_rig import (
    SHIFTED,
    Rig,
    by_path,
    check_layer,
    opened,
    own,
    python_for_all,
)

from ouassister.changeset.extract import outcome
from ouassister.errors import (
    InternalError,
    OUassisterError,
    UnsupportedGuestError,
    UsageError,
    WorkDiskFullError,
)
from ouassister.model import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.host


@pytest.fixture
def rig() -> Iterator[Rig]:
    with opened() as found:
        yield found


@pytest.fixture
def small(rig: Rig) -> Rig:
    """A lower tree of a few files, for tests of one thing each."""
    lower = rig.work / "lower"
    (lower / "etc" / "sub").mkdir(parents=True)
    for name in ("etc/conf", "etc/sub/one", "etc/sub/two", "tool"):
        (lower / name).write_text(name)
    os.link(lower / "tool", lower / "tool-alias")
    for path in [lower, *lower.rglob("*")]:
        own(path, SHIFTED)
    return rig


def test_extract_capability_and_acl_set_in_namespace_travel_as_the_guest_has_them(
    small: Rig,
) -> None:
    result = small.update(
        (
            "os.setxattr('merged/tool', 'security.capability', CAPABILITY)",
            "os.setxattr('merged/etc/conf', 'system.posix_acl_access', ACL)",
            "os.chown('merged/etc/conf', 1000, 65534)",
        )
    )
    entries = by_path(result)
    assert dict(entries[b"/tool"].xattrs) == {"security.capability": CAPABILITY}
    assert dict(entries[b"/etc/conf"].xattrs) == {"system.posix_acl_access": ACL}
    assert (entries[b"/etc/conf"].uid, entries[b"/etc/conf"].gid) == (1000, 65534)
    # On the host they are something else, which is why extraction runs inside.
    upper = small.work / "upper"
    assert len(os.getxattr(upper / "tool", "security.capability")) == 24
    assert os.getxattr(upper / "etc/conf", "system.posix_acl_access") != ACL


def test_extract_guests_own_overlay_attribute_is_unescaped(small: Rig) -> None:
    script = ("os.setxattr('merged/etc/conf', 'user.overlay.opaque', b'mine')",)
    if tuple(int(part) for part in os.uname().release.split(".")[:2]) < (6, 7):
        pytest.skip("only Linux 6.7 and later escape overlay attributes")
    entries = by_path(small.update(script))
    assert dict(entries[b"/etc/conf"].xattrs) == {"user.overlay.opaque": b"mine"}


def test_extract_opaque_directory_deletes_only_what_is_gone(small: Rig) -> None:
    result = small.update(
        (
            "[os.unlink(f'merged/etc/sub/{n}') for n in ('one', 'two')]",
            "os.rmdir('merged/etc/sub')",
            "os.mkdir('merged/etc/sub')",
            "open('merged/etc/sub/two', 'w').write('new')",
        )
    )
    assert os.getxattr(small.work / "upper/etc/sub", "user.overlay.opaque") == b"y"
    kinds = {entry.path: entry.kind for entry in result.entries}
    assert kinds == {b"/etc/sub/one": Kind.DELETE, b"/etc/sub/two": Kind.FILE}


def test_extract_directory_deleted_below_lists_all_of_it(small: Rig) -> None:
    result = small.update(("import shutil; shutil.rmtree('merged/etc')",))
    (entry,) = result.entries
    assert (entry.path, entry.kind) == (b"/etc", Kind.DELETE)
    assert [path for path, _ in entry.below] == [
        b"/etc/conf",
        b"/etc/sub",
        b"/etc/sub/one",
        b"/etc/sub/two",
    ]


def test_extract_whiteout_in_attribute_form_deletes(small: Rig) -> None:
    result = small.update(
        ("os.chmod('merged/etc', 0o755)",),
        upper_script=(
            "open('upper/etc/conf', 'w').close()",
            "os.setxattr('upper/etc/conf', 'user.overlay.whiteout', b'y')",
            "os.setxattr('upper/etc', 'user.overlay.opaque', b'x')",
        ),
    )
    assert [(e.path, e.kind) for e in result.entries] == [(b"/etc/conf", Kind.DELETE)]


@pytest.mark.parametrize("mark", ["redirect", "metacopy", "protattr", "upper"])
def test_extract_mark_that_our_mount_never_makes_is_refused(small: Rig, mark: str) -> None:
    with pytest.raises(UnsupportedGuestError, match=f"/etc with {mark}"):
        small.update(
            ("os.chmod('merged/etc', 0o700)",),
            upper_script=(f"os.setxattr('upper/etc', 'user.overlay.{mark}', b'/other')",),
        )


def test_extract_opaque_root_is_refused(small: Rig) -> None:
    with pytest.raises(InternalError, match="root of the union layer"):
        small.update(upper_script=("os.setxattr('upper', 'user.overlay.opaque', b'y')",))


def test_extract_copy_up_without_change_is_dropped(small: Rig) -> None:
    result = small.update(
        (
            "os.close(os.open('merged/etc/conf', os.O_RDWR))",
            "os.chmod('merged/etc/sub', 0o755)",
            "open('merged/etc/sub/new', 'w').close()",
        )
    )
    assert (small.work / "upper/etc/conf").exists()
    assert [entry.path for entry in result.entries] == [b"/etc/sub/new"]


def test_extract_holes_of_a_file_are_told(small: Rig) -> None:
    result = small.update(
        (
            "f = open('merged/etc/holes', 'wb'); f.seek(1 << 20); f.write(b'x'); f.close()",
            "open('merged/etc/zeros', 'wb').write(bytes(1 << 20))",
            "os.truncate('merged/etc/conf', 1 << 16)",
        )
    )
    entries = by_path(result)
    assert (entries[b"/etc/holes"].size, entries[b"/etc/holes"].holes) == ((1 << 20) + 1, 1 << 20)
    assert (entries[b"/etc/zeros"].size, entries[b"/etc/zeros"].holes) == (1 << 20, 0)
    assert entries[b"/etc/conf"].holes == (1 << 16) - 4096


def test_extract_one_name_of_a_hard_link_is_noted(small: Rig) -> None:
    result = small.update(("open('merged/tool', 'a').write('x')",))
    assert result.notes == ("/tool changes; 1 more names of that file in the guest do not",)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_extract_owner_outside_of_the_namespace_is_refused(small: Rig, kind: str) -> None:
    stranger = small.work / "upper" / "stranger"
    stranger.parent.mkdir()
    own(stranger.parent, SHIFTED)
    stranger.touch() if kind == "file" else stranger.mkdir()
    own(stranger, SHIFTED + 65534)  # the guest's nobody
    assert by_path(small.extract())[b"/stranger"].uid == 65534
    own(stranger, 65534)  # the host's: reads as 65534 inside, too
    with pytest.raises(InternalError, match="/stranger in the union layer is outside"):
        small.extract()


def test_extract_root_of_a_strangers_group_is_refused(small: Rig) -> None:
    upper = small.work / "upper"
    upper.mkdir()
    os.chown(upper, SHIFTED, 65534)
    with pytest.raises(InternalError, match="outside of the user namespace"):
        small.extract()


def test_extract_without_room_leaves_no_file(small: Rig) -> None:
    full = small.work / "full"
    full.mkdir()
    own(full, SHIFTED)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(full)]
    assert small.space.run(mount).returncode == 0
    small.output = "full"
    with pytest.raises(WorkDiskFullError, match="no room for the layer"):
        small.update(("open('merged/big', 'wb').write(bytes(4 << 20))",))
    assert small.space.run(["ls", "-A", str(full)]).stdout == b""


def test_extract_path_of_the_longest_length_travels_and_a_longer_one_is_refused(
    small: Rig,
) -> None:
    longest = "/" + "/".join(["d" * 1] * 2046) + "/xx"
    assert len(longest) == 4095
    script = (
        "up = os.open('merged', os.O_RDONLY)\n"
        "for part in {parts!r}:\n"
        "    os.mkdir(part, dir_fd=up)\n"
        "    inner = os.open(part, os.O_RDONLY, dir_fd=up)\n"
        "    os.close(up)\n"
        "    up = inner\n"
        "os.close(os.open({name!r}, os.O_CREAT | os.O_WRONLY, 0o4644, dir_fd=up))\n"
        "os.close(up)\n"
    )
    *parts, name = longest[1:].split("/")
    upper = small.work / "upper"
    upper.mkdir()
    own(upper, SHIFTED)
    make = script.replace("merged", "upper")
    done = small.space.run(
        [
            python_for_all(),
            "-c",
            f"import os; os.chdir({str(small.work)!r})\n" + make.format(parts=parts, name=name),
        ]
    )
    assert done.returncode == 0
    result = small.extract()
    assert result.entries[-1].path == longest.encode()
    assert result.entries[-1].mode == 0o4644
    check_layer(result, small.work / "layer.tar")
    last = upper.stat()
    assert last.st_uid == SHIFTED
    rename = (
        "import os; fd = os.open('.', os.O_RDONLY)\n"
        f"for part in {parts!r}:\n"
        "    inner = os.open(part, os.O_RDONLY, dir_fd=fd); os.close(fd); fd = inner\n"
        "os.rename('xx', 'xxx', src_dir_fd=fd, dst_dir_fd=fd)"
    )
    subprocess.run([sys.executable, "-c", rename], cwd=upper, check=True)
    with pytest.raises(UnsupportedGuestError, match="path of 4096 bytes"):
        small.extract()


def program(argument: str, *, stdin: bool = False) -> subprocess.CompletedProcess[bytes]:
    argv = [sys.executable, "-I", "-m", "ouassister.changeset.extract"]
    return subprocess.run(
        argv if stdin else [*argv, argument],
        input=argument.encode() if stdin else None,
        stdout=subprocess.PIPE,
        check=False,
    )


@pytest.mark.parametrize("stdin", [True, False])
def test_extract_program_prints_a_summary_of_its_record(tmp_path: Path, stdin: bool) -> None:
    for name in ("upper", "lower"):
        (tmp_path / name).mkdir()
    (tmp_path / "upper" / "new").write_text("content")
    request = {
        "trees": [{"upper": str(tmp_path / "upper"), "lower": str(tmp_path / "lower")}],
        "layer": str(tmp_path / "layer.tar"),
        "record": str(tmp_path / "record.json"),
        "extra_rules": [["/left/*", "not wanted"]],
    }
    done = program(json.dumps(request), stdin=stdin)
    assert done.returncode == 0
    result = outcome(done.stdout, tmp_path / "record.json")
    assert [entry.path for entry in result.entries] == [b"/new"]
    (tmp_path / "record.json").write_bytes(b"{}")
    with pytest.raises(InternalError, match="is not what the extraction"):
        outcome(done.stdout, tmp_path / "record.json")


@pytest.mark.parametrize(
    ("argument", "status", "kind"),
    [
        ("not JSON", 2, UsageError),
        ("[]", 2, UsageError),
        ('{"trees": [{"upper": "/nonexistent"}]}', 2, UsageError),
        ('{"trees": [{"upper": 1, "lower": "l"}], "layer": "x", "record": "y"}', 2, UsageError),
        (
            '{"trees": [{"upper": "/nonexistent", "lower": "/"}], "layer": "x", "record": "y"}',
            1,
            InternalError,
        ),
    ],
)
def test_extract_program_bad_request_has_the_documented_status(
    tmp_path: Path, argument: str, status: int, kind: type[OUassisterError]
) -> None:
    done = program(argument)
    assert done.returncode == status
    with pytest.raises(kind):
        outcome(done.stdout, tmp_path / "record.json")


def test_extract_program_that_died_is_an_internal_error(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="ended without a result"):
        outcome(b"", tmp_path / "record.json")
