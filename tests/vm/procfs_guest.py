"""What runs inside the guest for `test_procfs`: processes of every kind, and what /proc says."""

from __future__ import annotations

from typing import Final

PREPARE: Final = r"""set -e
dd if=/dev/zero of=/swap bs=1M count=16 status=none; chmod 600 /swap
mkswap /swap >/dev/null; swapon -p 3 /swap
run() { systemd-run -q "$@"; }
run --unit=oua-plain -p Nice=7 -p LimitNOFILE=321:654 -p OOMScoreAdjust=-321 /bin/sleep infinity
run --unit=oua-jail -p User=nobody -p NoNewPrivileges=yes -p PrivateTmp=yes -p UMask=027 \
    -p 'SystemCallFilter=~reboot' -p CapabilityBoundingSet=CAP_CHOWN /bin/sleep infinity
run --unit=oua-rt -p CPUSchedulingPolicy=rr -p CPUSchedulingPriority=11 /bin/sleep infinity
run --unit=oua-ids -p PrivateUsers=yes /bin/sleep infinity
run --unit=oua-perl /usr/bin/perl /root/procfs.pl
for i in $(seq 100); do [ -e /run/oua-ready ] && break; sleep 0.2; done; [ -e /run/oua-ready ]
"""

PROGRAM: Final = r"""use strict; $| = 1; # a session with a group, a zombie, a title, odd names
$0 = "oua title with  spaces \\ and (parentheses)";
$SIG{HUP} = 'IGNORE'; $SIG{USR1} = sub {};
my $child = fork // die; if (!$child) { setpgrp; $0 = 'oua-child'; sleep 1 while 1 }
my $zombie = fork // die; exit 3 if !$zombie;
for my $last (29999, 19999) { # the later child has the lower pid
  open my $pids, '>', '/proc/sys/kernel/ns_last_pid'; syswrite $pids, $last; close $pids;
  my $late = fork // die; if (!$late) { $0 = "oua-after-$last"; sleep 100000 while 1 } }
open my $name, '>', '/proc/self/comm'; syswrite $name, "odd) name\n"; close $name;
open my $file, '>>', "/root/odd\nname"; open my $gone, '<', '/root/procfs.pl';
use Fcntl ':flock'; flock $file, LOCK_EX or die; chdir '/var/tmp'; select undef, undef, undef, 0.5;
open my $ready, '>', '/run/oua-ready'; close $ready;
sleep 100000 while 1;
"""

# Files with hexadecimal content, links with theirs, folders with nothing.
LIVE: Final = r"""use strict; $| = 1;
sub slurp { open my $f, '<', $_[0] or return undef; local $/; my $t = <$f>; return $t // '' }
sub show { my ($path) = @_; my ($mode, $uid, $gid) = (lstat $path)[2, 4, 5];
  return unless defined $mode; my $text = -l $path ? readlink $path : -d _ ? '' : slurp($path);
  return unless defined $text;
  print join(' ', unpack('H*', substr $path, 6), $mode, $uid, $gid, unpack('H*', $text)), "\n" }
show("/proc/$_") for qw(version cmdline filesystems devices misc loadavg stat uptime meminfo cpuinfo
  partitions swaps modules locks mounts net diskstats);
show("/proc/1/net/$_") for qw(tcp tcp6 udp udp6 unix);
for my $p (map { m{/proc/(\d+)$} } glob '/proc/[0-9]*') {
  show("/proc/$p");
  show("/proc/$p/$_") for qw(stat status statm comm cmdline limits cgroup oom_score_adj loginuid
    sessionid uid_map gid_map auxv environ maps mounts mountinfo exe cwd root);
  for my $d (qw(fd fdinfo ns)) { show("/proc/$p/$d"); show($_) for glob "/proc/$p/$d/*" }
  for my $t (glob "/proc/$p/task/*") { show($t); show("$t/$_") for qw(stat status comm children) }
}
"""
