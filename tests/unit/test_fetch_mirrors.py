"""Which hosts and addresses a package manager in the shadow may reach."""

from __future__ import annotations

import pytest

from ouassister.shadow.fetch.mirrors import Mirrors, is_remote, place_of, places_of


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("http://deb.example/debian/", ("deb.example", 80)),
        ("https://user:secret@Deb.Example./debian", ("deb.example", 443)),
        ("http://[2001:db8::1]:8080/x", ("2001:db8::1", 8080)),
        ("mirror+http://mirrors.example/list", ("mirrors.example", 80)),
        ("file:/srv/debian", None),
        ("cdrom:[x]/", None),
        ("ftp://deb.example/", None),
        ("http:///x", None),
        ("http://a b/", None),
        ("http://deb.example:99999/", None),
        ("http://[bad/", None),
    ],
)
def test_place_of_a_source(uri: str, place: tuple[str, int] | None) -> None:
    assert place_of(uri) == place


def test_places_are_bounded_and_each_is_there_once() -> None:
    uris = ["http://a/1", "http://a/2", "https://a/", *(f"http://h{n}/" for n in range(1000))]
    places = places_of(uris)
    assert places[:3] == (("a", 80), ("a", 443), ("h0", 80))
    assert len(places) == 256


@pytest.mark.parametrize(
    "address",
    ["93.184.216.34", "10.0.0.5", "192.168.1.1", "100.64.0.1", "2001:db8::1", "fd00::1"],
)
def test_other_machines_may_be_meant(address: str) -> None:
    assert is_remote(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.0.1", "0.0.0.0", "0.1.2.3", "169.254.169.254", "224.0.0.1",  # noqa: S104
        "255.255.255.255", "240.0.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:169.254.169.254", "2002:7f00:0001::",
    ],
)  # fmt: skip
def test_addresses_of_this_host_and_its_links_are_not(address: str) -> None:
    assert not is_remote(address)


def test_owner_may_name_a_local_mirror() -> None:
    place = ("localhost", 8080)
    mirrors = Mirrors((place, ("deb.example", 80)), local=(place,))
    assert mirrors.reaches("LocalHost.", 8080)
    assert not mirrors.reaches("localhost", 8081)
    assert mirrors.may_connect("localhost", 8080, "127.0.0.1")
    assert not mirrors.may_connect("deb.example", 80, "127.0.0.1")
    assert mirrors.may_connect("deb.example", 80, "93.184.216.34")
