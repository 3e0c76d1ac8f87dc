"""The package database without some packages: stanzas, versions, relations."""

from __future__ import annotations

import pytest

from ouassister.partial import relations, status
from ouassister.partial.status import StatusError

INSTALLED = "Status: install ok installed"


def stanza(name: str, version: str = "1.0", *fields: str, state: str = INSTALLED) -> bytes:
    lines = [f"Package: {name}", state, "Architecture: amd64", f"Version: {version}", *fields]
    return "\n".join([*lines, "Description: a package", " of several lines", " ."]).encode()


def database(*stanzas: bytes) -> tuple[status.Package, ...]:
    return status.parse(b"".join(one + b"\n\n" for one in stanzas))


def test_database_comes_back_byte_for_byte() -> None:
    raw = b"".join(stanza(name) + b"\n\n" for name in ("a1", "b1", "c1"))
    packages = status.parse(raw)
    assert status.dump(packages) == raw
    assert [one.name for one in packages] == ["a1", "b1", "c1"]
    assert packages[0].fields["description"] == "a package of several lines ."
    assert status.parse(b"") == ()


@pytest.mark.parametrize(
    "raw",
    [
        b"Package: a1\nno field\n",
        b" Package: a1\n",
        b"Status: install ok installed\n",
        b"Package: A_b\n",
        b"Package: a1\nPackage: b1\n",
        b"\0\n",
    ],
)
def test_what_dpkg_does_not_write_is_refused(raw: bytes) -> None:
    with pytest.raises(StatusError):
        status.parse(raw)


def test_packages_are_put_back_to_what_they_were() -> None:
    new = database(stanza("app", "2.0"), stanza("fresh"), stanza("lib", "2.0"), stanza("stays"))
    old_app = stanza("app", "1.0", "Conffiles:", " /etc/app 123")
    gone = stanza("gone", "1.0")
    left = status.without(new, {"app": old_app, "fresh": b"", "gone": gone})
    assert status.dump(left) == b"".join(
        one + b"\n\n" for one in (old_app, stanza("lib", "2.0"), stanza("stays"), gone)
    )
    assert status.without(new, {}) == new


def test_package_of_two_architectures_is_not_left_out() -> None:
    twice = stanza("app") + b"\n\n" + stanza("app").replace(b"amd64", b"i386")
    with pytest.raises(StatusError, match="app is there for more than one architecture"):
        status.without(status.parse(twice), {"app": stanza("app")})


@pytest.mark.parametrize(
    ("state", "installed", "settled"),
    [
        ("install ok installed", True, True),
        ("hold ok installed", True, True),
        ("deinstall ok config-files", False, True),
        ("install ok triggers-awaited", False, False),
        ("install ok half-configured", False, False),
        ("install reinstreq half-installed", False, False),
    ],
)
def test_state_is_what_dpkg_says(state: str, *, installed: bool, settled: bool) -> None:
    (one,) = database(stanza("app", state=f"Status: {state}"))
    assert (one.is_installed, one.is_settled) == (installed, settled)


@pytest.mark.parametrize(
    ("one", "other", "order"),
    [
        ("1.0", "1.0", 0),
        ("1.0", "1.00", 0),
        ("1.0-1", "1.0", 1),
        ("1.0~rc1", "1.0", -1),
        ("1.0~~", "1.0~", -1),
        ("1:0.1", "2.0", 1),
        ("0:1.0", "1.0", 0),
        ("1.9", "1.10", -1),
        ("1.0a", "1.0+", -1),
        ("1.0+b1", "1.0", 1),
        ("1.0-1~deb12u1", "1.0-1", -1),
        ("2.36-9+deb12u7", "2.36-9+deb12u10", -1),
        ("1.0-1-1", "1.0-1", 1),
        ("1" + "0" * 5000, "2" + "0" * 5000, -1),
        ("0" * 5000 + "7", "7", 0),
        ("", "0", 0),
    ],
)
def test_versions_are_ordered_as_dpkg_orders_them(one: str, other: str, order: int) -> None:
    assert relations.compare(one, other) == order
    assert relations.compare(other, one) == -order


LIB = stanza("lib", "2.0", "Provides: lib-api (= 5), virtual")


@pytest.mark.parametrize(
    ("field", "holds"),
    [
        ("Depends: lib", True),
        ("Depends: lib:any (>= 2.0), lib (<< 3)", True),
        ("Pre-Depends: lib (= 2.0)", True),
        ("Depends: lib (>> 2.0)", False),
        ("Depends: none", False),
        ("Depends: none | lib (>= 1)", True),
        ("Depends: virtual", True),
        ("Depends: virtual (>= 1)", False),
        ("Depends: lib-api (>= 5)", True),
        ("Depends: lib-api (>= 6)", False),
        ("Breaks: lib (<< 2.0)", True),
        ("Breaks: lib (<< 2.1)", False),
        ("Conflicts: virtual", False),
        ("Conflicts: none, app", True),  # a package does not conflict with itself
        ("Recommends: none", True),
    ],
)
def test_relations_hold_or_are_told(field: str, *, holds: bool) -> None:
    found = relations.broken(database(LIB, stanza("app", "1.0", field)))
    assert (found == frozenset()) is holds
    assert {one.package for one in found} <= {"app"}


def test_relations_of_what_is_not_installed_do_not_count() -> None:
    gone = stanza("app", "1.0", "Depends: none", state="Status: deinstall ok config-files")
    assert relations.broken(database(gone)) == frozenset()
    wants = stanza("wants", "1.0", "Depends: app")
    assert {one.package for one in relations.broken(database(gone, wants))} == {"wants"}


def test_work_on_a_hostile_database_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relations, "_MOST_WORK", 50_000)
    many = [stanza(f"p{n:05}", "1", "Provides: x (= 1)", "Depends: x (>= 2)") for n in range(100)]
    with pytest.raises(StatusError, match="more relations than any"):
        relations.broken(database(*many))
    lines = stanza("app", "1.0") + b"\n line" * 100_000
    assert len(database(lines)[0].fields["description"]) > 500_000


def test_names_of_a_relation() -> None:
    assert relations.names("lib:any (>= 2), b | c (= 1) [amd64]".replace(", ", " | ")) == {
        "lib",
        "b",
        "c",
    }
