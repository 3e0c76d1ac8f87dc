"""What apt prints, as records. The samples are apt 2.6.2's of Debian 12, host names replaced."""

from __future__ import annotations

import pytest

from ouassister.errors import UpdaterError, UsageError
from ouassister.model import Archive, LeftOut, PackageChange, Request
from ouassister.packages import apt_output as read
from ouassister.packages.apt import check_request

INSTALL = """\
Reading package lists...
Building dependency tree...
Reading state information...
The following additional packages will be installed:
  bin86 elks-libc
The following NEW packages will be installed:
  bcc bin86 elks-libc
0 upgraded, 3 newly installed, 0 to remove and 126 not upgraded.
Inst bin86 (0.16.17-3.4 Debian:12.15/oldstable [amd64])
Inst bcc (0.16.17-3.4 Debian:12.15/oldstable [amd64])
Inst elks-libc (0.16.17-3.4 Debian:12.15/oldstable [all])
Conf bin86 (0.16.17-3.4 Debian:12.15/oldstable [amd64])
Conf bcc (0.16.17-3.4 Debian:12.15/oldstable [amd64])
Conf elks-libc (0.16.17-3.4 Debian:12.15/oldstable [all])
"""
UPGRADE = """\
Calculating upgrade...
The following packages have been kept back:
  grows libweb libweb:i386
The following packages will be upgraded:
  base-files libperl5.36 perl
3 upgraded, 0 newly installed, 0 to remove and 3 not upgraded.
Inst base-files [12.4+deb12u11] (12.4+deb12u15 Debian:12.15/oldstable [amd64])
Conf base-files (12.4+deb12u15 Debian:12.15/oldstable [amd64])
Inst libperl5.36 [5.36.0-7+deb12u2] (5.36.0-7+deb12u4 Debian-Security:12/oldstable-security \
[amd64]) [perl:amd64 ]
Inst perl [5.36.0-7+deb12u2] (5.36.0-7+deb12u4 Debian-Security:12/oldstable-security [amd64]) []
"""
REPLACE = """\
The following packages will be REMOVED:
  oldweb
The following NEW packages will be installed:
  web
The following packages will be upgraded:
  libweb libweb:i386
2 upgraded, 1 newly installed, 1 to remove and 1 not upgraded.
Remv oldweb [0.9-1]
Inst libweb [1.9-1] (2.0.1~rc1-3 mirror.example [amd64]) [libweb:amd64 on libweb:i386] \
[libweb:i386 on libweb:amd64] [libweb:i386 ]
Inst libweb:i386 [1.9-1] (2.0.1~rc1-3 mirror.example [i386])
Inst web (1:2.0-1+deb12u1 mirror.example [amd64])
Conf libweb (2.0.1~rc1-3 mirror.example [amd64])
Conf libweb:i386 (2.0.1~rc1-3 mirror.example [i386])
Conf web (1:2.0-1+deb12u1 mirror.example [amd64])
"""
PURGE = """\
The following packages will be REMOVED:
  oldweb*
0 upgraded, 0 newly installed, 1 to remove and 3 not upgraded.
Purg oldweb [0.9-1]
Remv libweb:i386 [1.9-1] [web:amd64 ]
"""
SHA = "a" * 64
URIS = f"""\
Need to get 1431 B of archives.
After this operation, 0 B of additional disk space will be used.
'http://mirror.example/pool/libweb_2.0.1%7erc1-3_i386.deb' \
libweb_2.0.1~rc1-3_i386.deb 98 SHA256:{SHA}
'http://mirror.example/pool/libweb_2.0.1%7erc1-3_amd64.deb' \
libweb_2.0.1~rc1-3_amd64.deb 99 SHA256:{SHA}
'http://mirror.example/pool/web_2.0-1%2bdeb12u1_amd64.deb' \
web_1%3a2.0-1+deb12u1_amd64.deb 1234 SHA256:{SHA}
"""
UPDATE_UNRESOLVED = """\
Get:1 http://other.example/debian bookworm InRelease [151 kB]
Ign:4 http://mirror.example/debian bookworm InRelease
Err:4 http://mirror.example/debian bookworm InRelease
  Could not resolve 'mirror.example'
Reading package lists...
W: Failed to fetch http://mirror.example/debian/dists/bookworm/InRelease  \
Could not resolve 'mirror.example'
W: Some index files failed to download. They have been ignored, or old ones used instead.
"""
UPDATE_404 = """\
Ign:6 http://mirror.example/no bookworm/main all Packages
Err:7 http://mirror.example/no bookworm/main i386 Packages
  404  File not found [IP: 192.0.2.1 80]
Err:7 http://mirror.example/no bookworm/main i386 Packages
  404  File not found [IP: 192.0.2.1 80]
Fetched 1476 B in 0s (14.6 kB/s)
Reading package lists...
E: Failed to fetch http://mirror.example/no/dists/bookworm/main/binary-i386/Packages  \
404  File not found
E: Some index files failed to download. They have been ignored, or old ones used instead.
"""
NOT_FOUND = """\
Reading package lists...
E: Unable to locate package nosuch
E: Unable to locate package g++-99:i386
"""
NO_CANDIDATE = """\
Package notthere is not available, but is referred to by another package.
This may mean that the package is missing, has been obsoleted, or
is only available from another source

E: Package 'notthere' has no installation candidate
"""
NO_VERSION = "E: Version '9' for 'web' was not found\n"
UNMET = """\
The following packages have unmet dependencies:
 broken : Depends: notthere but it is not installable
E: Unable to correct problems, you have held broken packages.
"""


def test_install_is_read_in_apt_s_order() -> None:
    assert read.parse_changes(INSTALL) == (
        PackageChange("bin86", "amd64", "", "0.16.17-3.4"),
        PackageChange("bcc", "amd64", "", "0.16.17-3.4"),
        PackageChange("elks-libc", "all", "", "0.16.17-3.4"),
    )


def test_upgrade_is_read_with_old_versions() -> None:
    assert read.parse_changes(UPGRADE) == (
        PackageChange("base-files", "amd64", "12.4+deb12u11", "12.4+deb12u15"),
        PackageChange("libperl5.36", "amd64", "5.36.0-7+deb12u2", "5.36.0-7+deb12u4"),
        PackageChange("perl", "amd64", "5.36.0-7+deb12u2", "5.36.0-7+deb12u4"),
    )


def test_replacement_is_read_with_removal_epoch_and_foreign_architecture() -> None:
    assert read.parse_changes(REPLACE) == (
        PackageChange("oldweb", "", "0.9-1", ""),
        PackageChange("libweb", "amd64", "1.9-1", "2.0.1~rc1-3"),
        PackageChange("libweb", "i386", "1.9-1", "2.0.1~rc1-3"),
        PackageChange("web", "amd64", "", "1:2.0-1+deb12u1"),
    )


def test_purge_is_a_removal() -> None:
    assert read.parse_changes(PURGE) == (
        PackageChange("oldweb", "", "0.9-1", ""),
        PackageChange("libweb", "i386", "1.9-1", ""),
    )


@pytest.mark.parametrize(
    "line",
    [
        "Inst ",
        "Inst bcc",
        "Inst bcc (0.16 Debian)",
        "Inst -rf (1 x [amd64])",
        "Inst ../../x (1 x [amd64])",
        "Inst bcc (1;reboot x [amd64])",
        "Inst bcc [1\x1b[2J] (2 x [amd64])",
        "Remv bcc",
        "Remv bcc [1 2]",
        "Purg Bcc [1]",
    ],
)
def test_line_that_cannot_be_read_is_an_error(line: str) -> None:
    with pytest.raises(UpdaterError, match="cannot be read") as caught:
        read.parse_changes(INSTALL + line + "\n")
    assert caught.value.message.isprintable()


def test_kept_back_is_left_out() -> None:
    reason = "kept back by the guest's apt"
    kept = tuple(LeftOut(name, reason) for name in ("grows", "libweb", "libweb:i386"))
    assert read.parse_kept_back(UPGRADE) == kept
    assert read.parse_kept_back(INSTALL) == ()
    shown = UPGRADE.replace(  # as with APT::Get::Show-Versions in the guest's apt.conf
        "  grows libweb libweb:i386\n",
        "   grows (1 => 2)\n   libweb (1.9-1 => 2.0.1~rc1-3)\n   libweb:i386 (1.9-1 => 2.0-3)\n",
    )
    assert read.parse_kept_back(shown) == kept
    assert read.parse_kept_back(UPGRADE.replace("grows", "\x1b[2J")) == kept[1:]


def test_archives_are_read_with_encoded_names() -> None:
    base = "http://mirror.example/pool/"
    lib, web = "libweb_2.0.1%7erc1-3", "web_2.0-1%2bdeb12u1_amd64.deb"
    sha = f"SHA256:{SHA}"
    assert read.parse_archives(URIS) == (
        Archive("libweb", f"{base}{lib}_i386.deb", "libweb_2.0.1~rc1-3_i386.deb", 98, sha),
        Archive("libweb", f"{base}{lib}_amd64.deb", "libweb_2.0.1~rc1-3_amd64.deb", 99, sha),
        Archive("web", f"{base}{web}", "web_1%3a2.0-1+deb12u1_amd64.deb", 1234, sha),
    )
    assert read.parse_archives(INSTALL) == ()


@pytest.mark.parametrize(
    "line",
    [
        f"'http://m/x.deb' ../../etc/passwd 1 SHA256:{SHA}",
        f"'http://m/x.deb' .. 1 SHA256:{SHA}",
        f"'http://m/x.deb' /etc/passwd 1 SHA256:{SHA}",
        f"'http://m/x.deb' x.deb -1 SHA256:{SHA}",
        f"'http://m/x.deb' x.deb {'9' * 5000} SHA256:{SHA}",
        f"'http://m/x.deb' x.deb 1 MD5Sum:{'a' * 32}",
        "'http://m/x.deb' x.deb 1 SHA256:zz",
        "'http://m/x.deb' x.deb 1",
    ],
)
def test_archive_that_cannot_be_read_is_an_error(line: str) -> None:
    with pytest.raises(UpdaterError, match="named an archive that cannot be read"):
        read.parse_archives(URIS + line + "\n")


def test_missing_packages_are_named() -> None:
    assert read.missing_packages(NOT_FOUND) == ("nosuch", "g++-99:i386")
    assert read.missing_packages(NO_CANDIDATE) == ("notthere",)
    assert read.missing_packages(NO_VERSION) == ("web",)
    assert read.missing_packages(UNMET) == ()
    assert read.missing_packages("E: Unable to locate package \x1b[2J\n") == ()


def test_unreachable_indexes_are_named_once() -> None:
    assert read.unreachable_indexes(UPDATE_UNRESOLVED) == ("http://mirror.example/debian bookworm",)
    assert read.unreachable_indexes(UPDATE_404) == ("http://mirror.example/no bookworm/main",)
    assert read.unreachable_indexes(INSTALL) == ()


def test_error_lines_tell_what_went_wrong() -> None:
    assert read.error_lines(UNMET) == ("Unable to correct problems, you have held broken packages.")
    assert read.error_lines(UPDATE_404, most=1).startswith("Some index files failed")
    assert read.error_lines("a\n\nb\nc\nd\n") == "b; c; d"
    assert read.error_lines("dpkg: error processing bcc\nx\n") == "dpkg: error processing bcc"
    assert read.error_lines("\n") == "no message"


def test_progress_keeps_what_is_worth_telling() -> None:
    lines = [
        "Reading package lists...",
        "Get:1 http://mirror.example bookworm/main amd64 bcc amd64 0.16.17-3.4 [126 kB]",
        "Unpacking bcc (0.16.17-3.4) ...",
        "Setting up bcc (0.16.17-3.4) ...",
        "Processing triggers for man-db (2.11.2-2) ...",
    ]
    assert list(read.progress(lines)) == [
        lines[1],
        "Unpacking bcc (0.16.17-3.4)",
        "Setting up bcc (0.16.17-3.4)",
        "Processing triggers for man-db (2.11.2-2)",
    ]


@pytest.mark.parametrize("word", ["bcc", "g++", "libc6:i386", "bcc=1:2.0~rc1-3+b1", "0ad", "x264"])
def test_package_names_are_accepted(word: str) -> None:
    check_request(Request((word,)))


ODD_WORDS = (
    *("", "-y", "--reinstall", "Bcc", "bcc-", "bcc:amd64-", "bcc=1-", "bcc*", "bcc^", "a b"),
    *("./x.deb", "bcc\n", "bcc;x", "$(x)", "bcc=", "bcc:", "bcc/stable", "é", "a" * 256, "\udcff"),
)


@pytest.mark.parametrize("word", ODD_WORDS)
def test_other_words_are_refused_before_anything_starts(word: str) -> None:
    with pytest.raises(UsageError, match="is not a package name"):
        check_request(Request(("bcc", word)))


def test_packages_without_what_they_need_are_named() -> None:
    """Lines of apt 2.6, which was told to leave mariadb-server-core alone."""
    told = """The following information may help to resolve the situation:

The following packages have unmet dependencies:
 mariadb-server : Depends: mariadb-server-core (>= 1:10.11) but it is not installable
                  Recommends: pv but it is not going to be installed
 libfoo:i386 : Depends: bar but it is not going to be installed
E: Unable to correct problems, you have held broken packages.
 after : the list
"""
    assert read.broken_packages(told) == ("mariadb-server", "libfoo")
    assert read.broken_packages(told.replace("The following packages have unmet", "Some")) == ()
