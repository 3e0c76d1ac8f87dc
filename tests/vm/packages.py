"""The packages of the tests' repository, and what the guest has of them before it sleeps."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.vm.repository import Package

_UNIT: Final = """[Unit]
Description=Tells how often it was started
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'echo started >>/var/lib/oua-service.log'
[Install]
WantedBy=multi-user.target
"""

# A program of two services, a script of a third, and a rule that keeps one of them.
_SLEEPER: Final = "/usr/lib/oua-daemon/sleeper"
_DAEMONS: Final = {
    f"/lib/systemd/system/oua-{name}.service": f"[Service]\nExecStart={command}\n"
    for name, command in (
        ("daemon", f"{_SLEEPER} infinity"),
        ("kept", f"{_SLEEPER} infinity"),
        ("script", "/bin/sh /usr/bin/oua-script"),
    )
}
_RULE: Final = {
    "/etc/needrestart/needrestart.conf": "$nrconf{override_rc} = { qr(^oua-kept) => 0 };\n"
}
# The same program in other bytes: what has the same ones keeps its inode, and nobody is restarted.
_PLACE: Final = (
    f"mkdir -p /usr/lib/oua-daemon; cp /bin/sleep {_SLEEPER}.new; echo $DPKG_MAINTSCRIPT_NAME $2"
    f" >>{_SLEEPER}.new; mv {_SLEEPER}.new {_SLEEPER}"
)

_CONNECT: Final = (
    "perl -e 'use Socket; socket(S, AF_UNIX, SOCK_STREAM, 0) or die;"
    ' connect(S, pack_sockaddr_un("/run/systemd/journal/stdout")) or die "nobody listens: $!\\n"\''
)


_KNOCK: Final = (
    "perl -e 'use Socket; socket(S, AF_INET, SOCK_DGRAM, 0);"
    ' send(S, "knock", 0, pack_sockaddr_in(9, inet_aton("10.0.2.2")))\' || true'
)


# What test_goes_on.py has in use.
def _renew(*names: str) -> str:
    lines = [
        f"[ ! -e /srv/oua/{name} ] || {{ cp -p /srv/oua/{name} /srv/oua/{name}.new;"
        f" echo new >>/srv/oua/{name}.new; mv /srv/oua/{name}.new /srv/oua/{name}; }}"
        for name in names
    ]
    return "\n".join(lines)


def store(version: str) -> Package:
    """A service that holds its data open for writing, and converts them in its postinst."""
    return Package(
        "oua-store",
        version,
        files={
            "/lib/systemd/system/oua-store.service": "[Service]\n"
            "ExecStartPre=/bin/sh -c 'echo started >>/var/lib/oua-store.starts'\n"
            "ExecStart=/bin/sh -c 'exec /usr/lib/oua-store/keeper infinity 3>>/srv/oua-store'\n",
        },
        scripts={
            "preinst": "mkdir -p /usr/lib/oua-store; cp /bin/sleep /usr/lib/oua-store/keeper.new\n"
            f"echo {version} >>/usr/lib/oua-store/keeper.new\n"
            "mv /usr/lib/oua-store/keeper.new /usr/lib/oua-store/keeper",
            "postinst": f"echo {version} >>/srv/oua-store\nsystemctl daemon-reload\n"
            "systemctl restart oua-store.service",
        },
    )


def calls(services: int) -> Package:
    """Services that a script starts one by one; the last one fails."""
    units = {
        f"/lib/systemd/system/oua-calls{number}.service": "[Service]\nType=oneshot\n"
        f"RemainAfterExit=yes\nExecStart=/bin/{'true' if number < services else 'false'}\n"
        for number in range(1, services + 1)
    }
    starts = [f"systemctl start {Path(path).name} || true" for path in units]
    return Package(
        "oua-calls",
        "1.0",
        files=units,
        scripts={"postinst": "\n".join(["systemctl daemon-reload", *starts])},
    )


BEFORE: Final = (
    Package(
        "oua-daemon",
        "1.0",
        files={"/usr/bin/oua-script": "while :; do sleep 1000; done # one\n", **_DAEMONS, **_RULE},
        scripts={
            "postinst": f"{_PLACE}\nsystemctl daemon-reload\n"
            "systemctl start oua-daemon oua-kept oua-script"
        },
    ),
    Package(
        "oua-hello",
        "1.0",
        files={
            "/usr/bin/oua-hello": "#!/bin/sh\necho one\n",
            "/usr/share/oua-hello/gone": "removed by 2.0\n",
            "/usr/share/oua-hello/becomes-link/file": "inside a directory\n",
            "/etc/oua-hello.conf": "setting=one\n",
        },
        conffiles=("/etc/oua-hello.conf",),
        scripts={
            # As dpkg-maintscript-helper's dir_to_symlink does it.
            "prerm": 'if [ "$1" = upgrade ]; then rm -r /usr/share/oua-hello/becomes-link; fi'
        },
    ),
)

# In the index alone: nobody has a disk for it.
HUGE: Final = f"""
Package: oua-huge
Version: 1.0
Architecture: all
Maintainer: Tests <tests@localhost>
Description: larger than any disk
Filename: ./oua-huge_1.0_all.deb
Size: {1 << 60}
SHA256: {"0" * 64}
"""

AFTER: Final = (
    Package(
        "oua-daemon",
        "2.0",
        files={"/usr/bin/oua-script": "while :; do sleep 1000; done # two\n", **_DAEMONS, **_RULE},
        scripts={"postinst": _PLACE},  # it restarts nothing
    ),
    Package(
        "oua-hello",
        "2.0",
        depends="oua-library",
        files={
            "/usr/bin/oua-hello": "#!/bin/sh\necho two\n",
            "/usr/share/oua-hello/new": "added by 2.0\n",
            "/etc/oua-hello.conf": "setting=two\n",
        },
        links={"/usr/share/oua-hello/becomes-link": "new"},
        conffiles=("/etc/oua-hello.conf",),
    ),
    Package("oua-library", "1.0", files={"/usr/share/oua-library/data": "library\n"}),
    Package("oua-extra", "1.0", files={"/usr/bin/oua-extra": "#!/bin/sh\necho extra\n"}),
    Package("oua-kernel", "1.0", files={"/boot/vmlinuz-9.9.9-1-cloud-amd64": "no kernel\n"}),
    Package("oua-gone", "1.0", files={"/usr/bin/oua-gone": "#!/bin/sh\necho gone\n"}),
    Package(
        "oua-service",
        "1.0",
        files={"/lib/systemd/system/oua-service.service": _UNIT},
        scripts={
            "postinst": (
                "uname -r >/usr/share/oua-service.release\n"
                "deb-systemd-helper enable oua-service.service >/dev/null\n"
                "if [ -d /run/systemd/system ]; then\n"
                "    systemctl --system daemon-reload >/dev/null || true\n"
                "    deb-systemd-invoke start oua-service.service >/dev/null || true\n"
                "fi"
            )
        },
    ),
    Package(
        "oua-broken",
        "1.0",
        files={"/usr/share/oua-broken/file": "never configured\n"},
        scripts={"postinst": "echo broken on purpose >&2\nexit 3"},
    ),
    # Only the running guest has somebody who listens there.
    Package(
        "oua-live",
        "1.0",
        files={"/usr/share/oua-live/file": "live\n"},
        # Whoever talks to the guest through its agent loses what the agent had started.
        scripts={
            "postinst": f"{_CONNECT}\n{_KNOCK}\nsystemctl restart qemu-guest-agent\n"
            "echo configured >>/var/lib/oua-live.log"
        },
    ),
    Package(
        "oua-user",
        "1.0",
        depends="oua-live",
        files={"/usr/bin/oua-user": "#!/bin/sh\necho user\n"},
        scripts={"postinst": "grep -q configured /var/lib/oua-live.log"},
    ),
    # It asks the guest's web server and goes on without an answer: it would leave something else.
    # And it asks whoever installs it, who is nobody.
    Package(
        "oua-asks",
        "1.0",
        depends="debconf",
        control={
            "templates": "Template: oua-asks/colour\nType: string\nDefault: blue\n"
            "Description: Which colour?\n"
        },
        files={"/usr/share/oua-asks/file": "asks\n"},
        scripts={
            "config": ". /usr/share/debconf/confmodule\n"
            "db_input critical oua-asks/colour || :\ndb_go || :",
            "postinst": ". /usr/share/debconf/confmodule\n"
            "perl -e 'use Socket; socket(S, AF_INET, SOCK_STREAM, 0);"
            ' connect(S, pack_sockaddr_in(80, inet_aton("127.0.0.1"))) or exit 0;'
            ' open(F, ">", "/var/lib/oua-asks"); print F "answered";\'',
        },
    ),
    # It stops that web server, and makes sure that nobody answers: so it is awake, too.
    Package(
        "oua-stops",
        "1.0",
        files={"/usr/share/oua-stops/file": "stops\n"},
        scripts={
            "postinst": "systemctl stop nginx.service\n"
            "perl -e 'use Socket; socket(S, AF_INET, SOCK_STREAM, 0);"
            ' exit(connect(S, pack_sockaddr_in(80, inet_aton("127.0.0.1"))) ? 1 : 0)\'\n'
            "systemctl start nginx.service",
        },
    ),
    # It is unpacked only where oua-live is configured.
    Package(
        "oua-early",
        "1.0",
        depends="dpkg\nPre-Depends: oua-live",
        files={"/usr/share/oua-early/file": "early\n"},
        scripts={"preinst": "grep -q configured /var/lib/oua-live.log"},
    ),
    # It fails where it was configured before, as in a round that was not forgotten.
    Package(
        "oua-once",
        "1.0",
        files={"/usr/share/oua-once/file": "once\n"},
        scripts={
            "postinst": "for ran in /run/oua-once /var/lib/oua-once; do\n"
            '    [ ! -e "$ran" ] || exit 5\n    touch "$ran"\ndone'
        },
    ),
    # The call is refused, and the script does not mind.
    Package(
        "oua-keys",
        "1.0",
        files={"/usr/share/oua-keys/file": "keys\n"},
        scripts={"postinst": "perl -e 'syscall(250, 0, -3, 1)'"},  # keyctl(KEYCTL_GET_KEYRING_ID)
    ),
    Package("oua-renews", "1.0", scripts={"postinst": _renew("program", "library.so")}),
    Package("oua-relogs", "1.0", files={"/srv/oua/log": "new\n"}),
    store("2.0"),
    calls(4),
    # With it the daemon does not start again, for as long as the file is there.
    Package(
        "oua-spoil",
        "1.0",
        files={
            "/srv/oua-spoil": "in the way\n",
            "/lib/systemd/system/oua-daemon.service.d/spoil.conf": "[Service]\n"
            "ExecStartPre=/usr/bin/test ! -e /srv/oua-spoil\n",
        },
    ),
    # As openssh-server does it; the program is another file than the one that runs.
    Package(
        "oua-sshd",
        "1.0",
        scripts={
            "postinst": "cp /usr/sbin/sshd /usr/sbin/sshd.new && echo >>/usr/sbin/sshd.new\n"
            "mv /usr/sbin/sshd.new /usr/sbin/sshd\ndeb-systemd-invoke restart ssh.service"
        },
    ),
    Package(
        "oua-slow",
        "1.0",
        files={"/usr/share/oua-slow/file": "slow\n"},
        scripts={"postinst": "sleep 600"},
    ),
    Package(
        "oua-big",
        "1.0",
        files={"/usr/share/oua-big/file": "big\n"},
        scripts={"postinst": "dd if=/dev/zero of=/usr/share/oua-big/zeroes bs=1M count=400"},
    ),
)
