"""A session of ssh over a guest's loopback that is open when the guest falls asleep."""

from __future__ import annotations

from typing import Final

_PLACE: Final = "/dev/shm/session"  # noqa: S108 - of the guest
# The other end answers each line with the pid of its shell. The client is in a scope of its own, as
# a person's is; the pipe has no end, since its reader writes to it as well.
OPEN: Final = f"""set -e
mkdir {_PLACE}
ssh-keygen -q -t ed25519 -N '' -f {_PLACE}/key
mkdir -p -m 700 /root/.ssh
cp {_PLACE}/key.pub /root/.ssh/authorized_keys
mkfifo {_PLACE}/ask
: >{_PLACE}/answers
setsid systemd-run --quiet --scope --unit=oua-client sh -c 'exec 3<>{_PLACE}/ask
ssh -i {_PLACE}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
    root@127.0.0.1 "while read -r line; do echo \\$line \\$\\$; done" \
    <&3 >>{_PLACE}/answers 2>/dev/null' >/dev/null 2>&1 </dev/null &
"""


def ask(word: str) -> str:
    """A command that asks the shell at the other end for its pid, where there is a session."""
    return (
        f"if [ -p {_PLACE}/ask ]; then echo {word} >{_PLACE}/ask; timeout 60 sh -c"
        f" 'until grep -q ^{word} {_PLACE}/answers; do sleep 0.1; done';"
        f" sed -n 's/^{word} //p' {_PLACE}/answers; fi"
    )
