"""A package whose script speaks with the service manager in every way, and keeps the answers."""

from __future__ import annotations

from typing import Final

from tests.vm.repository import Package

NAME: Final = "oua-calls"
ANSWERS: Final = "/usr/share/oua-calls.answers"


def _unit(name: str, service: str) -> dict[str, str]:
    text = f"[Unit]\nDescription=oua {name}\n[Service]\n{service}"
    return {
        f"/lib/systemd/system/oua-{name}.service": f"{text}[Install]\nWantedBy=multi-user.target\n"
    }


_ONESHOT: Final = (
    "Type=oneshot\nRemainAfterExit=yes\nExecStart=/bin/sh -c 'echo up >/run/oua-{0}'\n"
)
_DAEMON: Final = (
    'ExecStart=/bin/sh -c \'trap "echo usr1 >/run/oua-usr1" USR1;'
    " while :; do sleep 1000 & wait; done'\n"
    "ExecReload=/bin/sh -c 'echo reloaded >/run/oua-reloaded'\n"
)

# In the guest before it sleeps: what is asked about, stopped and restarted.
BEFORE: Final = Package(
    "oua-standing",
    files={
        **_unit("standing", _DAEMON),
        **_unit("leaving", "ExecStart=/bin/sleep infinity\n"),
    },
    scripts={
        "postinst": "systemctl daemon-reload\n"
        "systemctl enable --now oua-standing.service oua-leaving.service"
    },
)

_INIT_SCRIPT: Final = """#!/bin/sh
### BEGIN INIT INFO
# Provides: oua-old
# Required-Start: $local_fs
# Required-Stop:
# Default-Start: 2 3 4 5
# Default-Stop: 0 1 6
# Short-Description: made for a test
### END INIT INFO
case $1 in
start) echo up >/run/oua-old ;;
stop) rm -f /run/oua-old ;;
restart | force-reload) echo up >/run/oua-old ;;
status) test -e /run/oua-old ;;
esac
"""

_SCRIPT: Final = rf"""
ask() {{
	status=0
	told=$("$@" 2>&1 </dev/null) || status=$?
	printf '%s\n%s\nstatus %s\n' "\$ $*" "$told" "$status"
}}
quietly() {{ # what it prints has times in it
	status=0
	"$@" >/dev/null 2>&1 </dev/null || status=$?
	printf '%s\nstatus %s\n' "\$ $*" "$status"
}}
if [ "$1" = configure ]; then
{{
ask systemctl is-active ssh.service
ask systemctl is-active ssh
ask systemctl is-active --quiet oua-standing
ask systemctl is-active oua-none.service
ask systemctl is-active ssh.service oua-none.service
ask systemctl is-failed ssh.service
ask systemctl is-enabled ssh.service
ask systemctl is-enabled oua-standing.service
ask systemctl is-enabled oua-none.service
ask systemctl is-system-running
ask systemctl get-default
ask systemctl show -P ActiveState ssh.service
ask systemctl show -p LoadState,ActiveState,SubState,UnitFileState,MainPID,Type ssh.service
ask systemctl show -p MainPID --value oua-standing.service
ask systemctl show -P FragmentPath oua-standing.service
ask systemctl show -P LoadState oua-none.service
quietly systemctl status oua-standing.service
quietly systemctl status oua-none.service
ask systemctl daemon-reload
ask systemctl is-active oua-one.service
ask systemctl is-enabled oua-one.service
ask systemctl enable oua-one.service
ask systemctl is-enabled oua-one.service
ask systemctl start oua-one.service
ask systemctl is-active oua-one.service
ask systemctl restart oua-one.service
ask systemctl try-restart oua-two.service
ask systemctl is-active oua-two.service
ask systemctl enable --now oua-two.service
ask systemctl is-active oua-two.service
ask systemctl reload oua-standing.service
ask systemctl reload-or-restart oua-standing.service
ask systemctl kill -s USR1 oua-standing.service
ask systemctl stop oua-leaving.service
ask systemctl is-active oua-leaving.service
ask systemctl disable oua-leaving.service
ask systemctl is-enabled oua-leaving.service
ask systemctl mask oua-three.service
ask systemctl is-enabled oua-three.service
ask systemctl start oua-three.service
ask systemctl unmask oua-three.service
ask systemctl preset oua-three.service
ask systemctl is-enabled oua-three.service
ask systemctl disable --now oua-three.service
ask systemctl add-wants multi-user.target oua-four.service
ask systemctl link /usr/share/oua-calls/oua-linked.service
ask systemctl is-enabled oua-linked.service
ask systemctl start oua-calls.socket
ask systemctl enable --now oua-calls.timer
ask systemctl is-active oua-calls.socket oua-calls.timer
ask systemctl reset-failed
ask systemctl set-environment OUA_CALLS=1
ask systemctl unset-environment OUA_CALLS
ask systemctl cat oua-one.service
ask systemctl list-unit-files --no-legend --no-pager 'oua-*'
ask systemctl list-units --no-legend --no-pager --plain 'oua-*.service'
ask deb-systemd-helper unmask oua-five.service
ask deb-systemd-helper --quiet was-enabled oua-five.service
ask deb-systemd-helper enable oua-five.service
ask deb-systemd-helper update-state oua-five.service
ask deb-systemd-invoke start oua-five.service
ask systemctl is-active oua-five.service
ask invoke-rc.d oua-five restart
ask service oua-five restart
ask update-rc.d oua-old defaults
ask systemctl daemon-reload
ask invoke-rc.d oua-old start
quietly service oua-old status
ask systemctl no-such-verb
}} >{ANSWERS}
fi
"""

PACKAGE: Final = Package(
    NAME,
    files={
        **_unit("one", _ONESHOT.format("one")),
        **_unit("two", _ONESHOT.format("two")),
        **_unit("three", _ONESHOT.format("three")),
        **_unit("four", _ONESHOT.format("four")),
        **_unit("five", _ONESHOT.format("five")),
        **_unit("calls", _ONESHOT.format("calls")),
        "/usr/share/oua-calls/oua-linked.service": "[Service]\nExecStart=/bin/true\n",
        "/lib/systemd/system/oua-calls.socket": "[Socket]\nListenStream=/run/oua-calls.sock\n",
        "/lib/systemd/system/oua-calls.timer": (
            "[Timer]\nOnBootSec=100d\n[Install]\nWantedBy=timers.target\n"
        ),
        "/etc/init.d/oua-old": _INIT_SCRIPT,
    },
    scripts={"postinst": _SCRIPT},
)
