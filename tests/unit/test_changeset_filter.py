"""What never travels, and that its neighbours do."""

from __future__ import annotations

import pytest

from ouassister.changeset.filter import RULES, SOCKET_REASON, Filter, Rule
from ouassister.errors import InternalError

FILTER = Filter()


@pytest.mark.parametrize(
    "path",
    [
        b"/run",
        b"/run/lock/x",
        b"/proc/1/status",
        b"/tmp/x",
        b"/tmp/x/y",
        b"/etc/machine-id",
        b"/etc/ssh/ssh_host_ed25519_key.pub",
        b"/var/lib/systemd/random-seed",
        b"/etc/resolv.conf",
        b"/var/lib/dpkg/lock-frontend",
        b"/var/lib/dpkg/triggers/Lock",
        b"/var/cache/apt/pkgcache.bin",
        b"/var/cache/apt/archives/partial",
        b"/var/lib/apt/lists/a_Packages",
        b"/var/cache/ldconfig/aux-cache",
        b"/var/log/apt/term.log",
        b"/var/log/dpkg.log",
        b"/tmp/with\nnewline",
        b"/tmp/\xff\xfe/x",
    ],
)
def test_reason_of_what_stays_behind_is_given(path: bytes) -> None:
    assert FILTER.reason(path)


@pytest.mark.parametrize(
    "path",
    [
        b"/",
        b"/runner",
        b"/tmp",
        b"/usr/tmp/x",
        b"/etc/machine-id.d",
        b"/etc/ssh/sshd_config",
        b"/etc/ssh/sub/ssh_host_key",
        b"/etc/ssh",
        b"/var/lib/dpkg/status-old",
        b"/var/lib/dpkg/diversions-old",
        b"/var/cache/debconf/config.dat",
        b"/var/cache/apt",
        b"/var/cache/man/index.db",
        b"/etc/ld.so.cache",
        b"/var/lib/apt/extended_states",
        b"/var/log/dpkg.log\n",
        b"/var/log/apt",
        b"/srv/etc/machine-id",
    ],
)
def test_reason_of_what_travels_is_none(path: bytes) -> None:
    assert FILTER.reason(path) is None


def test_rules_all_have_a_pattern_that_covers_itself() -> None:
    for rule in RULES:
        assert rule.reason
        assert FILTER.reason(rule.pattern.replace(b"*", b"x")) == rule.reason


@pytest.mark.parametrize("pattern", [b"relative", b"", b"/", b"//x", b"/a/../b", b"/a/./b", b"/a/"])
def test_rule_that_is_no_absolute_path_is_refused(pattern: bytes) -> None:
    with pytest.raises(InternalError, match="is not an absolute path"):
        Filter((Rule(pattern, "why"),))


def test_rule_with_special_characters_means_them_literally() -> None:
    strict = Filter((Rule(b"/a.b(c|d)*", "why"),))
    assert strict.reason(b"/a.b(c|d)e") == "why"
    assert strict.reason(b"/axb(c|d)e") is None


def test_filter_without_rules_keeps_everything() -> None:
    assert Filter(()).reason(b"/run/x") is None


def test_explain_names_rule_socket_and_empty_directory() -> None:
    filtered = frozenset({b"/etc/machine-id", b"/opt/s", b"/opt/d", b"/opt/d/sock"})
    assert FILTER.explain(b"/etc/machine-id", filtered) == FILTER.reason(b"/etc/machine-id")
    assert FILTER.explain(b"/opt/s", filtered) == SOCKET_REASON
    assert "nothing left" in FILTER.explain(b"/opt/d", filtered)
