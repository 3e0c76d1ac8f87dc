"""Which channel the resume will use, told from memory and the guest's files."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tests.unit.test_sleeping import CLEAN, SYSTEMD

from ouassister.access import Access
from ouassister.disk import small_files
from ouassister.errors import UnsupportedGuestError
from ouassister.model import GuestPid, OpenFile, ProcessFiles, Socket, Sockets
from ouassister.provider.helper import UNIT
from ouassister.provider.port import PROTOCOL_NAME
from ouassister.reaching import agent, helper, sshd
from ouassister.reaching.choose import refuse_too_large

if TYPE_CHECKING:
    from pathlib import Path

    from ouassister.model import GuestView

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGsCjSSkTjBhogUO8af7PTcFCKZGg+J89WMxBVTIrkA6"
OTHER = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKsCjSSkTjBhogUO8af7PTcFCKZGg+J89WMxBVTIrkA7"
AGENT = replace(
    SYSTEMD, pid=GuestPid(300), comm=b"qemu-ga", exe=b"/usr/sbin/qemu-ga", cmdline=(b"qemu-ga",)
)
HELPER = replace(
    SYSTEMD,
    pid=GuestPid(500),
    comm=b"ouassister-port",
    exe=b"/usr/local/sbin/ouassister-port",
    cmdline=(b"/usr/local/sbin/ouassister-port", b"/dev/virtio-ports/org.ouassister.0"),
)
SSHD = replace(SYSTEMD, pid=GuestPid(400), comm=b"sshd", exe=b"/usr/sbin/sshd")


def held(pid: int, *paths: bytes) -> ProcessFiles:
    files = tuple(
        OpenFile(number, path, 2, True, True, 0, 0, 0, 0, 0, False)
        for number, path in enumerate(paths)
    )
    return ProcessFiles(GuestPid(pid), files)


def view(**changes: object) -> GuestView:
    plain = replace(
        CLEAN,
        tasks=(SYSTEMD, AGENT, SSHD),
        files=(held(300, b"/dev/null", b"/dev/vport3p1"), held(400, b"socket:[77]")),
        sockets=Sockets((Socket("tcp", b"0.0.0.0", 22, True, 0, 77),), 0),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def told(*words: bytes) -> GuestView:
    return view(tasks=(replace(AGENT, cmdline=(b"/usr/sbin/qemu-ga", *words)),))


def test_agent_that_runs_with_its_port_open_will_do() -> None:
    assert agent.problem(view(), None) == ""
    assert agent.problem(view(), b"[general]\ndaemon=false\nblock-rpcs=guest-shutdown\n") == ""
    assert agent.problem(told(b"-m", b"virtio-serial", b"--verbose"), b"") == ""


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (view(tasks=(SYSTEMD,)), "no qemu-ga ran"),
        (view(files=None), "memory does not tell"),
        (view(files=(held(300, b"/dev/null"), held(400, b"/dev/vport3p1"))), "no virtio port"),
        (told(b"-b", b"guest-exec"), "forbids guest-exec"),
        (told(b"-bguest-file-open,guest-exec-status"), "forbids guest-exec-status"),
        (told(b"--blacklist=guest-file-write, guest-exec"), "forbids guest-exec"),
        (told(b"--block-rpcs", b"guest-exec"), "forbids guest-exec"),
        (told(b"--allow-rpcs=guest-ping,guest-exec"), "forbids guest-exec-status"),
    ],
)
def test_agent_that_cannot_be_used_is_told_with_the_reason(seen: GuestView, words: str) -> None:
    assert words in agent.problem(seen, b"")


@pytest.mark.parametrize(
    ("text", "forbids"),
    [
        (b"[general]\nblacklist = guest-exec\n", True),
        (b"# a comment\n[general]\nblock-rpcs=guest-info,guest-exec\n", True),
        (b"[general]\nallow-rpcs=guest-ping\n", True),
        (b"[other]\nblock-rpcs=guest-exec\n", False),
        (b"[general]\n#block-rpcs=guest-exec\n", False),
        (b"\xff\xfe\n[general]\nblock-rpcs\n", False),
    ],
)
def test_configuration_of_the_agent_is_read(text: bytes, *, forbids: bool) -> None:
    assert ("forbids" in agent.problem(view(), text)) == forbids


def test_command_line_counts_before_the_file_and_names_it() -> None:
    seen = told(b"--config=/etc/ga.conf", b"--block-rpcs=guest-shutdown")
    assert agent.configuration(seen) == b"/etc/ga.conf"
    assert agent.configuration(view()) == agent.CONFIGURATION
    assert agent.problem(seen, b"[general]\nblock-rpcs=guest-exec\n") == ""


def helped(**changes: object) -> GuestView:
    task = replace(HELPER, **changes)  # type: ignore[arg-type]
    return view(tasks=(SYSTEMD, task), files=(held(500, b"/dev/null", b"/dev/vport3p2"),))


def port(
    seen: GuestView | None = None,
    content: bytes | None = b"\x7fELF" + PROTOCOL_NAME + b"\0",
    units: tuple[str, ...] = (UNIT,),
    wanted: tuple[str, ...] = (UNIT,),
) -> str:
    return helper.problem(seen or helped(), content, units, wanted)


def test_helper_that_runs_with_its_port_open_will_do() -> None:
    assert port() == ""
    assert helper.program(helped()) == HELPER.exe
    assert port(content=None) == ""  # it was replaced since it started, for one
    assert port(units=(), wanted=()) == ""  # somebody has installed it in another way
    assert len(HELPER.comm) == 15  # what the kernel keeps of a name


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (port(view(), units=()), "has no ouassister-port.service: 'ouassister helper'"),
        (port(view(), wanted=()), "is not enabled"),
        (port(view()), "no ouassister-port ran"),
        (port(replace(helped(), files=None)), "memory does not tell"),
        (port(helped(uid=1000)), "no ouassister-port of root had"),
        (port(helped(cmdline=(b"ouassister-port", b"/dev/virtio-ports/x"))), "of root had"),
        (port(replace(helped(), files=(held(500, b"/dev/null"),))), "of root had"),
        (port(replace(helped(), files=(held(300, b"/dev/vport3p2"),))), "of root had"),
        (port(content=b"ouassister-port protocol 0"), "of another version"),
    ],
)
def test_helper_that_cannot_be_used_is_told_with_the_reason(problem: str, words: str) -> None:
    assert words in problem
    assert helper.program(view()) is None


def look(
    seen: GuestView | None = None,
    settings: dict[str, str] | None = None,
    authorized: bytes = f"# mine\n{KEY} me@here\n".encode(),
    offered: tuple[str, ...] = (OTHER, KEY),
) -> str:
    return sshd.problem(seen or view(), 22, settings or {}, [None, authorized], offered)


PASSWD = b"""root:x:0:0:root:/root:/bin/bash
# odd
deploy:x:1000:1000::/srv/deploy/:
\xff:x:1001:1001::/srv/x:/bin/sh
backup:x:34:34:backup:/var/backups:/usr/sbin/nologin
fisher:x:1002:1002::/srv/f:/usr/bin/fish
short:x:1003
"""


@pytest.mark.parametrize(
    ("name", "sudoers", "words"),
    [
        ("root", None, ""),
        ("deploy", b"", ""),
        ("deploy", None, "the guest has no sudo"),
        ("nobody", b"", "has no user 'nobody'"),
        ("short", b"", "has no user 'short'"),
        ("backup", b"", "backup has 'nologin' for a shell"),
        ("fisher", b"", "fisher has 'fish' for a shell"),
    ],
)
def test_user_who_logs_in_is_looked_up(name: str, sudoers: bytes | None, words: str) -> None:
    told = sshd.refused_user(sshd.user(PASSWD, name), name, sudoers)
    assert (words in told) if words else not told


def test_keys_are_those_of_the_users_home() -> None:
    found = sshd.user(PASSWD, "deploy")
    assert found == sshd.User("deploy", b"/srv/deploy/", b"/bin/sh")
    assert found.authorized[0] == b"/srv/deploy/.ssh/authorized_keys"
    unread = sshd.user(None, "root")
    assert unread is not None
    assert unread.authorized[1] == b"/root/.ssh/authorized_keys2"
    other = sshd.problem(
        view(), 22, {"permitrootlogin": "no"}, [f"{KEY} x".encode()], (KEY,), "deploy"
    )
    assert other == ""
    assert "deploy's authorized_keys" in sshd.problem(view(), 22, {}, [], (KEY,), "deploy")


def test_sshd_that_takes_our_key_will_do() -> None:
    assert look() == ""
    assert look(authorized=f'no-pty,environment="A=b c" {KEY}'.encode()) == ""
    by_socket = view(tasks=(SYSTEMD,), files=(held(1, b"socket:[77]"),))
    assert look(by_socket) == ""
    assert look(settings={"authorizedkeysfile": "/etc/keys/%u"}, authorized=b"") == ""


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (look(view(sockets=None)), "memory does not tell"),
        (look(view(files=(held(300, b"socket:[77]"),))), "no sshd listened"),
        (
            look(view(sockets=Sockets((Socket("tcp", b"127.0.0.1", 22, True, 0, 77),), 0))),
            "no sshd listened on port 22",
        ),
        (look(settings={"permitrootlogin": "no"}), "PermitRootLogin no"),
        (look(settings={"pubkeyauthentication": "no"}), "PubkeyAuthentication no"),
        (look(offered=()), "no key to offer"),
        (look(offered=(OTHER,)), "none of our keys"),
        (look(authorized=f'from="10.0.0.1" {KEY}'.encode()), "none of our keys"),
        (look(authorized=f'command="a {OTHER}" {KEY}'.encode()), "none of our keys"),
        (look(authorized=f"#{KEY}".encode()), "none of our keys"),
        (look(authorized=b"\xff" * 100), "none of our keys"),
    ],
)
def test_sshd_that_lets_nobody_in_is_told_with_the_reason(problem: str, words: str) -> None:
    assert words in problem


def test_first_value_counts_files_are_included_in_their_place_and_a_match_ends_it() -> None:
    text = (
        b"# comment\nInclude /etc/ssh/sshd_config.d/*.conf\nPermitRootLogin yes\nPort=22\n"
        b'AuthorizedKeysFile "a b"\nMatch User root\nPubkeyAuthentication no\n'
    )
    assert sshd.settings_of(text, [b"permitrootlogin no\n", None]) == {
        "permitrootlogin": "no",
        "port": "22",
        "authorizedkeysfile": "a b",
    }
    assert sshd.settings_of(None, [b"PermitRootLogin no"]) == {}


def test_host_keys_are_taken_without_their_comments_and_malformed_ones_left_out() -> None:
    files = [f"{KEY} root@web1\n".encode(), b"", None, b"ssh-rsa AAAA\nguest ssh-rsa B", b"\xff"]
    assert sshd.host_keys([*files, KEY.encode()]) == (KEY,)


def test_small_files_are_read_where_no_link_leads_out(tmp_path: Path) -> None:
    (tmp_path / "etc" / "ssh").mkdir(parents=True)
    (tmp_path / "etc" / "ssh" / "b").write_bytes(b"b\xff")
    (tmp_path / "etc" / "ssh" / "a").write_bytes(bytes((256 << 10) + 1))
    (tmp_path / "etc" / "link").symlink_to("/etc/passwd")
    (tmp_path / "out").symlink_to("/etc")

    def place(path: str) -> dict[str, str]:
        return {"root": str(tmp_path), "path": path}

    paths = [
        "/etc/ssh/b",
        "/etc/ssh/a",
        "/etc/link",
        "/out/passwd",
        "/etc/ssh",
        "/none/x",
        "/",
        "/etc/../../x",
    ]
    found = small_files.read([place(path) for path in paths])
    assert found == ["b\\xff", *[None] * 7]
    assert small_files.names(place("/etc/ssh")) == ["a", "b"]
    assert small_files.names(place("/out")) == small_files.names(place("/etc/ssh/b")) == []
    for number in range(1025):
        (tmp_path / "out2" / str(number)).parent.mkdir(exist_ok=True)
        (tmp_path / "out2" / str(number)).touch()
    assert small_files.names(place("/out2")) == []


def test_more_than_a_channel_brings_in_good_time_is_refused() -> None:
    refuse_too_large("web1", Access(), 1 << 30)
    refuse_too_large("web1", Access(carried=True), 64 << 20)
    with pytest.raises(UnsupportedGuestError, match="brings no more than"):
        refuse_too_large("web1", Access(carried=True), (64 << 20) + 1)
