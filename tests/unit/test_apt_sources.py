"""Which of a host's apt sources are Debian's, in both formats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ouassister.errors import HostNotReadyError
from ouassister.testing.apt_sources import host_sources

if TYPE_CHECKING:
    from pathlib import Path

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


def test_deb822_is_narrowed_to_main_of_the_suite(etc: Path) -> None:
    (etc / "sources.list.d" / "debian.sources").write_text(
        f"""# comment
Types: deb deb-src
# another
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
 bookworm-backports
Components: main contrib
Check-Valid-Until: no
Signed-By: {KEYRING}

Types: deb
URIs: http://mirror.example/debian
Suites: trixie
Components: main

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main
"""
    )
    assert host_sources("bookworm", etc) == (
        "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n"
        f"Components: main\nSigned-By: {KEYRING}\nCheck-Valid-Until: no\n"
    )


def test_one_line_format_with_options_is_read(etc: Path) -> None:
    (etc / "sources.list").write_text(
        "# deb http://off.example/debian bookworm main\n"
        "deb [arch=amd64 check-valid-until=no] http://m.example/debian/ bookworm main # why\n"
        "deb-src http://m.example/debian bookworm main\n"
        "deb http://m.example/debian-security bookworm-security main contrib\n"
    )
    text = host_sources("bookworm", etc)
    assert text.count("Types: deb\n") == 2
    assert "Check-Valid-Until: no\n" in text
    assert "off.example" not in text
    assert "Suites: bookworm-security\n" in text


def test_others_that_use_debians_suite_names_are_left_out(etc: Path) -> None:
    (etc / "sources.list").write_text("deb http://m.example/debian bookworm main\n")
    (etc / "sources.list.d" / "other.list").write_text(
        "deb [signed-by=/etc/apt/keyrings/other.gpg] https://other.example/debian bookworm main\n"
        "deb https://third.example/apt bookworm main\n"
        "deb https://docker.example/linux/debian bookworm stable\n"
    )
    assert host_sources("bookworm", etc).count("URIs:") == 1


def test_mirror_list_of_cloud_images_is_resolved(etc: Path) -> None:
    (etc / "mirrors.list").write_text("# first\nhttps://m.example/debian\tpriority:1\n")
    (etc / "sources.list.d" / "debian.sources").write_text(
        f"Types: deb\nURIs: mirror+file://{etc}/mirrors.list\nSuites: bookworm\nComponents: main\n"
    )
    assert "URIs: https://m.example/debian\n" in host_sources("bookworm", etc)


def test_other_release_comes_from_the_same_mirrors(etc: Path) -> None:
    (etc / "sources.list").write_text(
        f"deb [signed-by={KEYRING}] http://m.example/debian bookworm main contrib\n"
        "deb http://m.example/debian bookworm-updates main\n"
        "deb http://s.example/debian-security bookworm-security main\n"
        "deb http://m.example/debian bookworm-backports main\n"
    )
    assert host_sources("trixie", etc, extra="trixie-backports") == (
        "Types: deb\nURIs: http://m.example/debian\nSuites: trixie trixie-backports\n"
        f"Components: main\nSigned-By: {KEYRING}\n\n"
        "Types: deb\nURIs: http://m.example/debian\nSuites: trixie-updates\nComponents: main\n\n"
        "Types: deb\nURIs: http://s.example/debian-security\nSuites: trixie-security\n"
        "Components: main\n"
    )


def test_unstable_has_no_updates(etc: Path) -> None:
    (etc / "sources.list").write_text(
        "deb http://m.example/debian bookworm main\n"
        "deb http://s.example/debian-security bookworm-security main\n"
    )
    text = host_sources("sid", etc, extra="sid")
    assert text.count("Types:") == 1
    assert "Suites: sid\n" in text


def test_own_suite_of_the_host_is_preferred_to_another(etc: Path) -> None:
    (etc / "sources.list").write_text(
        "deb http://old.example/debian bookworm main\ndeb http://new.example/debian trixie main\n"
    )
    assert "URIs: http://new.example/debian\nSuites: trixie\n" in host_sources("trixie", etc)
    assert "old.example" not in host_sources("trixie", etc)


def test_host_without_a_debian_mirror_is_told(etc: Path) -> None:
    (etc / "sources.list").write_text("deb http://m.example/ubuntu noble main\n")
    with pytest.raises(HostNotReadyError, match="bookworm"):
        host_sources("bookworm", etc)


def test_updates_alone_are_not_enough(etc: Path) -> None:
    (etc / "sources.list").write_text("deb http://m.example/debian bookworm-updates main\n")
    with pytest.raises(HostNotReadyError):
        host_sources("bookworm", etc)
