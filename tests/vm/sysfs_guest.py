"""What runs inside the guest for `test_sysfs`: all of /sys and /dev, as the guest shows them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

# A line for each file: path, mode, owner, links, number, size, device, and in hexadecimal what a
# link leads to or a file contains. A file that cannot be read has a dash there. What is mounted
# below is not entered, but for securityfs, of which some files would wait for news.
LIVE: Final = r"""use strict; $| = 1;
sub slurp { sysopen my $f, $_[0], 2048 or return undef; my $all = ''; my $t;
  while (1) { my $n = sysread $f, $t, 65536; return undef unless defined $n; last unless $n;
    $all .= $t; last if length $all > 65536 } return $all }
sub show { my ($path, $top, $read) = @_;
  my ($dev, $ino, $mode, $links, $uid, $gid, $rdev, $size) = lstat $path;
  return unless defined $mode;
  my $text = -l _ ? readlink $path : -f _ && $read && ($mode & 0444) && $size <= 65536
    ? slurp($path) : undef;
  print join(' ', unpack('H*', $path), $mode, $uid, $gid, $links, $ino, $size, $rdev,
    defined $text ? unpack('H*', $text) : '-'), "\n";
  return unless ($mode & 0170000) == 0040000 && $dev == $top;
  opendir my $d, $path or return; my @names = grep { $_ ne '.' && $_ ne '..' } readdir $d;
  show("$path/$_", $top, $read) for sort @names }
show('/sys', (lstat '/sys')[0], 1);
show('/sys/kernel/security', (lstat '/sys/kernel/security')[0], 1);
show('/dev', (lstat '/dev')[0], 0);
"""


# File systems of their own are mounted there in the guest; see shadow/sysfs/table.py.
MOUNTED: Final = re.compile(
    rb"/sys/(?:kernel/(?:tracing|security|debug|config)|firmware/efi/efivars"
    rb"|fs/(?:pstore|bpf|cgroup|fuse/connections))"
)
# It jumps to a file system that is mounted nowhere.
JUMPS: Final = b"/sys/kernel/security/apparmor/policy"
# Thousands of counters, and addresses: the folders are empty.
LEFT_OUT: Final = re.compile(rb"/sys/(?:kernel/slab|module/[^/]+/(?:sections|notes))/.*", re.DOTALL)
# The links are down when the guest wakes up, and its agent is asked.
MOVES: Final = re.compile(
    rb"/sys/(?:devices/.*/net/eth0/(?:carrier\w*|operstate|dormant|flags)"
    rb"|kernel/uevent_seqnum|module/\w+/refcnt|module/damon_stat/parameters/\w+)"
)
# Others are mounted there in the guest, and in the shadow.
STANDS_ON: Final = frozenset((b"/dev/pts", b"/dev/shm", b"/dev/mqueue", b"/dev/hugepages"))
# These are the host's: only type and number are the guest's.
LENT: Final = frozenset(
    b"/dev/" + name for name in (b"null", b"zero", b"full", b"random", b"urandom", b"tty", b"ptmx")
)


@dataclass(frozen=True)
class File:
    """What lstat(2) says, and what can be read."""

    mode: int
    uid: int
    gid: int
    links: int
    number: int
    size: int
    device: int
    content: bytes | None

    @property
    def attributes(self) -> tuple[int, ...]:
        return self.mode, self.uid, self.gid, self.links, self.number, self.size, self.device


def parse(text: str) -> dict[bytes, File]:
    """Read what `LIVE` prints."""
    found = {}
    for line in text.splitlines():
        path, mode, uid, gid, links, number, size, device, content = line.split(" ")
        raw = None if content == "-" else bytes.fromhex(content)
        found[bytes.fromhex(path)] = File(
            int(mode), int(uid), int(gid), int(links), int(number), int(size), int(device), raw
        )
    return found
