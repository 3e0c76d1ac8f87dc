"""What the guest's apt tells of its mirrors and proxies."""

from __future__ import annotations

from ouassister.packages import apt_mirrors

PROXY = "http://127.0.0.1:3142/"
SETTINGS = """Acquire "";
Acquire::http "";
Acquire::http::Proxy "http://proxy.example:3128";
Acquire::http::Proxy::direct.example "DIRECT";
Acquire::https::Proxy "";
Acquire::Retries "2";
APT::Note "Acquire::http::Pro";
"""


def test_mirrors_of_the_guest_are_reached_through_its_own_proxy() -> None:
    uris = (
        "http://deb.example/debian/\nhttp://deb.example/debian/\nfile:/srv/\nhttps://s.example/\n"
    )
    found = apt_mirrors.mirrors(uris, SETTINGS, [("127.0.0.1", 8080)])
    assert found.hosts == (("deb.example", 80), ("s.example", 443))
    assert found.local == (("127.0.0.1", 8080),)
    assert found.upstream == ("proxy.example", 3128)
    assert apt_mirrors.mirrors(uris, 'Acquire::http::Proxy "false";', []).upstream is None


def test_every_setting_that_leads_elsewhere_is_overruled() -> None:
    assert apt_mirrors.options(SETTINGS, PROXY) == (
        "Acquire::http::Proxy-Auto-Detect=",
        "Acquire::http::ProxyAutoDetect=",
        f"Acquire::http::Proxy={PROXY}",
        f"Acquire::http::Proxy::direct.example={PROXY}",
        f"Acquire::https::Proxy={PROXY}",
    )
    assert len(apt_mirrors.options("", PROXY)) == 4
