"""Packages that end well, each made for one thing that packages do to a system.

Each case is what the guest has of it before it falls asleep, what the repository offers, and what
an administrator did in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tests.cases import service_calls
from tests.vm.repository import Package


@dataclass(frozen=True)
class Case:
    """One thing that packages do. ``wish``: what is asked for; the rest comes with it."""

    wish: tuple[str, ...]
    offered: tuple[Package, ...]
    before: tuple[Package, ...] = ()
    admin: str = ":"  # a script of the administrator's, after ``before`` was installed
    fetched: tuple[str, ...] = ()  # packages of Debian that the guest has before


def _service(command: str, *, kind: str = "simple", more: str = "") -> str:
    return (
        f"[Unit]\nDescription=Made for a test\n[Service]\nType={kind}\n{more}"
        f"ExecStart={command}\n[Install]\nWantedBy=multi-user.target\n"
    )


_DIVERSION: Final = Case(
    ("oua-diverter",),
    (
        Package(
            "oua-diverter",
            files={"/usr/bin/oua-diverted": "#!/bin/sh\necho the diverter's\n"},
            scripts={
                "preinst": "dpkg-divert --package oua-diverter --add --rename"
                " --divert /usr/bin/oua-diverted.distrib /usr/bin/oua-diverted"
            },
        ),
    ),
    (Package("oua-diverted", files={"/usr/bin/oua-diverted": "#!/bin/sh\necho original\n"}),),
)


def _alternative(name: str, priority: int) -> Package:
    return Package(
        name,
        files={f"/usr/bin/{name}": f"#!/bin/sh\necho {name}\n", f"/usr/share/{name}.7": name},
        scripts={
            "postinst": f"update-alternatives --install /usr/bin/oua-edit oua-edit"
            f" /usr/bin/{name} {priority} --slave /usr/share/oua-edit.7 oua-edit.7"
            f" /usr/share/{name}.7"
        },
    )


_ALTERNATIVE: Final = Case(
    ("oua-editor-b",), (_alternative("oua-editor-b", 50),), (_alternative("oua-editor-a", 40),)
)


def _conffiles(version: str) -> Package:
    names = ("changed", "kept", "removed", "same")
    files = {f"/etc/oua-conf/{name}": f"{name} {version}\n" for name in names}
    files["/etc/oua-conf/same"] = "same\n"
    return Package("oua-conf", version, files=files, conffiles=tuple(files))


_CONFFILE: Final = Case(
    ("oua-conf",),
    (_conffiles("2.0"),),
    (_conffiles("1.0"),),
    "echo mine >/etc/oua-conf/changed; rm /etc/oua-conf/removed; chmod 640 /etc/oua-conf/same",
)

_TRIGGER: Final = Case(
    ("oua-words", "oua-activated"),
    (
        Package(
            "oua-words", files={"/usr/share/oua-words/two": "two\n", "/usr/share/oua-words/3": "3"}
        ),
        Package(
            "oua-activated",
            scripts={
                "postinst": "dpkg-trigger oua-rebuild\n"
                "if read -r answer; then echo read; else echo end; fi >/var/lib/oua-activated"
            },
        ),
    ),
    (
        Package(
            "oua-collector",
            files={"/usr/share/oua-words/one": "one\n"},
            control={"triggers": "interest-noawait /usr/share/oua-words\ninterest oua-rebuild\n"},
            scripts={
                "postinst": 'echo "$1" >/var/lib/oua-collector.last\n'
                "cat /usr/share/oua-words/* >/var/lib/oua-collector.words"
            },
        ),
    ),
)

# What is in memory: a folder that its service needs, what tells an administrator to reboot, and
# what is of no use any more.
_MEMORY: Final = Case(
    ("oua-memory",),
    (
        Package(
            "oua-memory",
            files={
                "/lib/systemd/system/oua-memory.service": _service(
                    "/bin/sh -c 'cat /run/oua-memory/sub/words >/var/lib/oua-memory.read'",
                    kind="oneshot",
                    more="RemainAfterExit=yes\n",
                )
            },
            scripts={
                "postinst": "install -d -m 750 -g daemon /run/oua-memory\n"
                "mkdir -p /run/oua-memory/sub\n"
                "printf 'two\\nlines %%s \\047\\n' >/run/oua-memory/sub/words\n"
                "chmod 640 /run/oua-memory/sub/words; chgrp daemon /run/oua-memory/sub/words\n"
                "ln -s sub/words /run/oua-memory/link\n"
                "touch /run/reboot-required; echo oua-memory >>/run/reboot-required.pkgs\n"
                "echo $$ >/run/oua-memory.pid; rm /run/oua-memory.pid\n"
                "rm -r /run/oua-gone/sub; rm /run/oua-link; mv /run/oua-gone/a /run/oua-gone/b\n"
                "deb-systemd-helper enable oua-memory.service\n"
                "systemctl daemon-reload; deb-systemd-invoke start oua-memory.service"
            },
        ),
    ),
    (),
    "echo before >/run/reboot-required.pkgs; mkdir -p /run/oua-gone/sub/deep;"
    " touch /run/oua-gone/kept /run/oua-gone/sub/file; echo a >/run/oua-gone/a;"
    " ln -s oua-gone /run/oua-link",
)

_RULES: Final = Case(
    ("oua-rules",),
    (
        Package(
            "oua-rules",
            files={
                "/usr/lib/sysusers.d/oua-rules.conf": 'u _oua - "Made for a test" /var/lib/oua\n',
                "/usr/lib/tmpfiles.d/oua-rules.conf": "d /run/oua-rules 0750 _oua _oua -\n"
                "d /var/lib/oua-rules 0700 _oua _oua -\nf /run/oua-rules/file 0640 _oua _oua - x\n",
                "/lib/udev/rules.d/60-oua-rules.rules": 'KERNEL=="null", SYMLINK+="oua-null"\n',
                "/usr/lib/sysctl.d/oua-rules.conf": "vm.swappiness = 37\n",
                "/lib/systemd/system/oua-rules.service": _service(
                    "/bin/sleep infinity", more="User=_oua\nWorkingDirectory=/run/oua-rules\n"
                ),
            },
            scripts={
                "postinst": "systemd-sysusers oua-rules.conf\n"
                "systemd-tmpfiles --create oua-rules.conf\n"
                "udevadm control --reload\nudevadm trigger --action=change /dev/null\n"
                "udevadm settle\n"
                "deb-systemd-helper enable oua-rules.service\nsystemctl daemon-reload\n"
                "deb-systemd-invoke start oua-rules.service"
            },
        ),
    ),
)

# The daemon counts what it is told; its pid file is in memory alone.
_LISTENER: Final = (
    "#!/bin/sh\necho $$ >/run/oua-signalled.pid\n"
    "trap 'echo again >>/var/lib/oua-signalled.log' HUP\n"
    "while :; do sleep 1000 & wait $!; done\n"
)


def _signalled(version: str, postinst: str) -> Package:
    return Package(
        "oua-signalled",
        version,
        files={
            "/usr/bin/oua-signalled": _LISTENER,
            "/lib/systemd/system/oua-signalled.service": _service("/usr/bin/oua-signalled"),
        },
        scripts={"postinst": postinst},
    )


_SIGNAL: Final = Case(
    ("oua-signalled",),
    (_signalled("2.0", 'pid=$(cat /run/oua-signalled.pid)\nkill -0 "$pid"\nkill -HUP "$pid"\n'),),
    (
        _signalled(
            "1.0",
            "systemctl daemon-reload\nsystemctl enable --now oua-signalled.service\n"
            "until [ -s /run/oua-signalled.pid ]; do sleep 0.1; done",
        ),
    ),
)

_TEMPLATES: Final = """Template: oua-question/colour
Type: select
Choices: red, green, blue
Default: green
Description: Which colour?
 Made for a test.

Template: oua-question/secret
Type: password
Description: Which password?
 Nobody answers this one.
"""
_QUESTION: Final = Case(
    ("oua-question",),
    (
        Package(
            "oua-question",
            depends="debconf",
            control={"templates": _TEMPLATES},
            scripts={
                "config": ". /usr/share/debconf/confmodule\ndb_input critical oua-question/colour"
                " || true\ndb_input critical oua-question/secret || true\ndb_go || true",
                "postinst": ". /usr/share/debconf/confmodule\ndb_get oua-question/colour\n"
                'echo "colour=$RET" >/etc/oua-question.conf\n'
                "db_get oua-question/secret\n"
                'echo "secret=$RET" >>/etc/oua-question.conf',
            },
        ),
    ),
)

_PROFILE: Final = """abi <abi/3.0>,
profile oua-confined /usr/bin/oua-confined {
  /** rwlkmix,
}
"""
# What debhelper's dh_apparmor writes.
_LOAD: Final = """if aa-enabled --quiet 2>/dev/null; then
apparmor_parser -r -T -W /etc/apparmor.d/oua-confined || true
fi
"""
_CONFINED: Final = Case(
    ("oua-confined",),
    (
        Package(
            "oua-confined",
            files={
                "/etc/apparmor.d/oua-confined": _PROFILE,
                "/usr/bin/oua-confined": "#!/bin/sh\nread -r line </proc/self/attr/current\n"
                'echo "$line" >/var/lib/oua-confined\nexec sleep infinity\n',
                "/lib/systemd/system/oua-confined.service": _service("/usr/bin/oua-confined"),
            },
            conffiles=("/etc/apparmor.d/oua-confined",),
            scripts={
                "postinst": f"aa-enabled >/var/lib/oua-confined.enabled\n{_LOAD}"
                "systemctl daemon-reload\nsystemctl enable --now oua-confined.service",
            },
        ),
    ),
    fetched=("apparmor",),
)

_CALLS: Final = Case((service_calls.NAME,), (service_calls.PACKAGE,), (service_calls.BEFORE,))

CASES: Final[dict[str, Case]] = {
    "diversion": _DIVERSION,
    "alternative": _ALTERNATIVE,
    "conffile": _CONFFILE,
    "trigger": _TRIGGER,
    "memory": _MEMORY,
    "rules": _RULES,
    "signal": _SIGNAL,
    "question": _QUESTION,
    "profile": _CONFINED,
    "systemctl": _CALLS,
}
