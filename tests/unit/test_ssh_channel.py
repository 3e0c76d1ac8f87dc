"""What ssh is told and what is made of its end; a network that would reach further is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from ouassister.errors import ChannelError
from ouassister.provider import management, ssh

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGsCjSSkTjBhogUO8af7PTcFCKZGg+J89WMxBVTIrkA6"
MARK = "0123456789abcdef"
NETWORK = "user,id=mgmt,restrict=on,ipv6=off,net=10.77.0.0/24,hostfwd=tcp:127.0.0.1:2222-:22"


def command(network: str, *more: str) -> tuple[str, ...]:
    card = "virtio-net-pci,id=mgmt0,netdev=mgmt"
    return ("qemu-system-x86_64", "-netdev", network, "-device", card, *more)


def test_closed_network_is_found() -> None:
    key = Path("/key")
    found = management.find(command(NETWORK), "mgmt0", key)
    assert found == management.Management("mgmt0", "mgmt", 2222, 22, key)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (NETWORK.replace("restrict=on,", ""), "without restrict=on"),
        (NETWORK.replace("restrict=on", "restrict=off"), "without restrict=on"),
        (NETWORK + ",restrict=off", "without restrict=on"),
        (NETWORK + ",hostfwd=tcp:127.0.0.1:0-:80", "needs one hostfwd"),
        (NETWORK.replace("tcp:127", "udp:127"), "needs one hostfwd"),
        (NETWORK.partition(",hostfwd")[0], "needs one hostfwd"),
        (NETWORK.replace("127.0.0.1", ""), "every address"),
        (NETWORK.replace("127.0.0.1", "10.0.0.1"), "forwards from 10.0.0.1"),
        (NETWORK + ",guestfwd=tcp:10.77.0.9:80-cmd:cat", "guestfwd"),
        (NETWORK + ",smb=/srv", "smb"),
        (NETWORK.replace("user,", "tap,"), "no user network"),
        (NETWORK.replace("id=mgmt", "id=other"), "no -netdev"),
        ('{"type":"user","id":"mgmt","restrict":true}', "no -netdev"),
    ],
)
def test_network_that_reaches_further_is_refused(network: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        management.find(command(network), "mgmt0", None)


def test_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no -device"):
        management.find(command(NETWORK), "other", None)


def test_port_that_qemu_chose_is_that_of_the_network() -> None:
    table = """Hub -1 (net0):
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
  TCP[HOST_FORWARD]  11       127.0.0.1 41000       10.0.2.15    22     0     0
Hub -1 (mgmt):
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
  TCP[ESTABLISHED]   20       127.0.0.1 45756      10.77.0.15    22     0     0
  TCP[HOST_FORWARD]  12       127.0.0.1 45755      10.77.0.15    22     0     0
"""
    chosen = management.find(command(NETWORK.replace("2222", "0")), "mgmt0", None)
    assert management.forwarded_port(table, chosen) == 45755
    assert management.forwarded_port(table.replace("(mgmt)", "(net1)"), chosen) is None
    assert management.forwarded_port("", management.find(command(NETWORK), "mgmt0", None)) == 2222


@pytest.mark.parametrize("keys", [(), ("ssh-ed25519 AAAA\nguest ssh-rsa AAAA",), ("nonsense",)])
def test_guest_without_good_host_keys_is_not_asked(keys: tuple[str, ...]) -> None:
    with pytest.raises(ChannelError, match="anybody could answer"):
        ssh.SshChannel(22, None, keys)


def test_status_is_taken_from_behind_what_the_program_wrote() -> None:
    end = f"\n{MARK} 7\n".encode()
    assert ssh.ended(b"words\n" + end, b"", MARK) == (7, b"words\n")
    assert ssh.ended(b"words" + end[:3], end[3:], MARK) == (7, b"words")
    assert ssh.ended(f"\n{MARK} 137\n".encode(), b"", MARK) == (-9, b"")
    assert ssh.ended(f"\n{MARK} 255\n".encode(), b"", MARK) == (255, b"")


@pytest.mark.parametrize(
    "errors", [b"", b"\nother 0\n", f"\n{MARK} 0\nmore".encode(), f"\n{MARK} x\n".encode()]
)
def test_lost_connection_has_no_status(errors: bytes) -> None:
    assert ssh.ended(errors, b"", MARK) == (None, errors)


def test_words_reach_the_program_through_the_shell_and_long_ones_by_its_input() -> None:
    words, ahead = ssh.told(["printf", "<%s>", "a b", "'$(x)"], MARK)
    assert ahead == b""
    assert words == f"""printf '<%s>' 'a b' ''"'"'$(x)'; printf '\\n%s %s\\n' {MARK} "$?" >&2"""
    words, ahead = ssh.told(["printf", "x" * 200_000], MARK)
    assert len(words) < 200
    assert ahead == b"printf " + b"x" * 200_000
    words, ahead = ssh.told(["id", "-u"], MARK, by_sudo=True)
    assert words.startswith("sudo -n -- /bin/sh -c 'printf")
    assert f"' {MARK} id -u; printf" in words


def test_control_path_and_keys_of_any_name_are_one_word_of_ssh(tmp_path: Path) -> None:
    odd = tmp_path / 'a %h "b"'
    assert ssh._escape(odd) == f'"{tmp_path}/a %%h \\"b\\""'


def test_endless_output_is_cut_off_and_its_end_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "OUTPUT_LIMIT", 1000)
    stream = ssh.Stream()
    for _ in range(1000):
        stream.add(b"0123456789")
    stream.add(f"\n{MARK} 3\n".encode())
    stream.finish()
    assert (len(stream.data), len(stream.tail), stream.lost) == (1000, 128, True)
    status, errors = ssh.ended(stream.data, stream.tail, MARK)
    assert (status, errors) == (3, b"0123456789" * 100)
    whole = ssh.Stream()
    whole.add(b"x" * 1000)
    whole.finish()
    assert (whole.data, whole.lost) == (b"x" * 1000, False)
