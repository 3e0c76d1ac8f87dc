"""What runs inside the guest for `test_guestview`: it prepares a state, and tells what /proc shows.

Perl is essential in Debian, so every guest has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.guest_model import TmpfsContent
from ouassister.kernel.process_memory import PageState
from ouassister.model import GuestView

if TYPE_CHECKING:
    from ouassister.model import Task


@dataclass(frozen=True)
class Seen:
    """The sleeping guest as we see it, and what it says itself when it is awake."""

    view: GuestView
    probe: int
    environment: tuple[bytes, ...]
    states: set[PageState]
    content: TmpfsContent
    sections: dict[str, list[str]]
    found: list[list[bytes]]
    run: list[list[bytes]]
    sums: dict[bytes, str]

    def task(self, pid: int) -> Task:
        return next(task for task in self.view.tasks if task.pid == pid)

    @property
    def agents(self) -> set[int]:
        """Processes of the agent that asks."""
        return {task.pid for task in self.view.tasks if b"qemu-ga" in (task.exe or b"")}


PREPARE: Final = r"""set -e
modprobe loop; modprobe dm_mod
mkdir -p /mnt/oua && mount -t tmpfs -o mode=750,size=64m oua /mnt/oua && cd /mnt/oua
# swap
dd if=/dev/zero of=/swap bs=1M count=48 status=none; chmod 600 /swap
mkswap /swap >/dev/null; swapon -p 7 /swap
# tmpfs: everything that a tmpfs may contain
mkdir -p deep/er/still; chmod 2711 deep; chown 7:8 deep
mkfifo -m 620 fifo; mknod -m 600 char c 1 7; mknod block b 7 200
ln -s short-target short; ln -s "$(printf 'l%.0s' $(seq 1 300))" long
echo hello >deep/er/file; ln deep/er/file hard; touch -d '2001-02-03 04:05:06.789' deep/er/file
printf 'a\n\033[31m' >"$(printf 'odd\033[31m\nname')"
truncate -s 10M hole; echo middle | dd of=hole bs=1 seek=5000000 conv=notrunc status=none
fallocate -l 64K fallocated; dd if=/dev/urandom of=random bs=1000 count=777 status=none
: >empty
# device-mapper over two loop devices
for n in 0 1; do truncate -s 16M /loop$n; losetup /dev/loop$n /loop$n; done
perl /root/mapper.pl
ip link add ouabr type bridge; ip address add 192.0.2.7/29 dev ouabr; ip link set ouabr up
sysctl -qw vm.swappiness=37 net.ipv4.ip_forward=1 kernel.domainname=oua.test
systemd-run -q --unit=oua-probe@one --slice=oua-odd.slice /usr/bin/perl /root/probe.pl
for i in $(seq 100); do [ -e /mnt/oua/ready ] && break; sleep 0.2; done; [ -e /mnt/oua/ready ]
# pages of a tmpfs that are swapped out: a unit that may keep little in memory
systemd-run -q --wait -p MemoryMax=8M /bin/dd if=/dev/urandom of=/mnt/oua/swapped bs=64k count=384
"""

MAPPER: Final = r"""use strict; # device-mapper by its ioctls: dmsetup may be absent
my ($create, $load, $suspend) = (0xc138fd03, 0xc138fd09, 0xc138fd06);
open my $dm, '+<', '/dev/mapper/control' or die $!;
sub call { my ($command, $name, $uuid, $count, $data) = @_;
  my $size = 312 + length $data;
  my $raw = pack('L3 L L L l L L L Q a128 a129 x7', 4, 0, 0, $size, 312, $count, 0, 0, 0, 0, 0,
                 $name, $uuid) . $data;
  defined ioctl($dm, $command, $raw) or die "$command $name: $!"; }
sub target { my ($start, $size, $type, $text) = @_;
  $text .= "\0"; $text .= "\0" x (-length($text) % 8);
  return pack('Q Q l L a16', $start, $size, 0, 40 + length $text, $type) . $text; }
sub table { my ($name, $uuid, @targets) = @_;
  call($create, $name, $uuid, 0, '');
  call($load, $name, '', scalar @targets, join '', @targets);
  call($suspend, $name, '', 0, ''); }
table('oua-lin--ear', 'LVM-ouatest1', target(0, 8192, 'linear', '7:0 2048'),
      target(8192, 4096, 'linear', '7:1 64'));
"""

PROBE: Final = r"""use strict; use Socket qw(:DEFAULT pack_sockaddr_in6 IN6ADDR_ANY);
use Fcntl ':flock', 'F_SETLK', 'F_WRLCK', 'F_RDLCK', 'SEEK_SET';
$| = 1; chdir '/mnt/oua/deep';
open my $gone, '+>', '/root/unlinked' or die; print $gone 'x' x 5000; unlink '/root/unlinked';
seek $gone, 1234, 0;
open my $append, '>>', '/root/appended' or die; syswrite $append, "abc";
open my $flocked, '>', '/root/flocked' or die; flock $flocked, LOCK_EX or die;
open my $shared, '<', '/root/flocked' or die;
open my $record, '+>', '/root/recorded' or die;
my $lock = pack('s s x4 q q i x4', F_WRLCK, SEEK_SET, 10, 20, 0);
fcntl $record, F_SETLK, $lock or die $!;
$lock = pack('s s x4 q q i x4', F_RDLCK, SEEK_SET, 100, 0, 0);
fcntl $record, F_SETLK, $lock or die $!;
$lock = pack('s s x4 q q i x4', F_RDLCK, SEEK_SET, 5, 5, 0);
fcntl $shared, 37, $lock or die $!; # F_OFD_SETLK
pipe my $in, my $out;
socket my $tcp, PF_INET, SOCK_STREAM, 0; setsockopt $tcp, SOL_SOCKET, SO_REUSEADDR, 1;
bind $tcp, sockaddr_in(7007, inet_aton('127.0.0.1')) or die; listen $tcp, 5;
socket my $client, PF_INET, SOCK_STREAM, 0;
connect $client, sockaddr_in(7007, inet_aton('127.0.0.1')) or die; accept my $peer, $tcp;
socket my $udp, PF_INET6, SOCK_DGRAM, 0;
bind $udp, pack_sockaddr_in6(7008, IN6ADDR_ANY) or die;
socket my $unix, PF_UNIX, SOCK_STREAM, 0; bind $unix, sockaddr_un('/mnt/oua/socket') or die;
listen $unix, 5;
socket my $dgram, PF_UNIX, SOCK_DGRAM, 0; bind $dgram, sockaddr_un("\0oua\x07name") or die;
# memfd_create, epoll_create1, eventfd2, timerfd_create, inotify_init1 (asm/unistd_64.h)
my @fds = (syscall(319, my $name = 'oua-memfd', 0), syscall(291, 0), syscall(290, 3, 0),
           syscall(283, 1, 0), syscall(294, 0));
die "fds @fds" if grep { $_ < 0 } @fds;
open my $ns, '<', '/proc/self/ns/net' or die;
# setxattr: user attributes where the kernel has them on tmpfs, trusted ones everywhere
syscall(188, my $path = '/mnt/oua/random', my $key = 'trusted.oua', my $value = "v\0x", 3, 0);
syscall(188, $path, $key = 'user.oua', $value = 'plain', 5, 0);
# a mapping of a deleted file, and a shared anonymous one
syscall(9, 0, 8192, 3, 1, fileno($gone), 0); syscall(9, 0, 12288, 3, 0x21, -1, 0);
$ENV{OUA} = 'x'; open my $ready, '>', '/mnt/oua/ready'; print $ready "$$\n"; close $ready;
sleep 1 while 1;
"""

LIVE: Final = r"""use strict; $| = 1; # sections of what the kernel tells, names in hexadecimal
sub slurp { open my $f, '<', $_[0] or return ''; local $/; my $t = <$f>; return $t // '' }
sub hex_of { return unpack 'H*', $_[0] }
for my $file (@ARGV) { print "=== $file\n", slurp($file) }
print "=== maps\n";
my @pids = sort { $a <=> $b } map { m{/proc/(\d+)$} } glob '/proc/[0-9]*';
for my $p (@pids) { print "$p $_\n" for split /\n/, slurp("/proc/$p/maps") }
print "=== files\n";
for my $p (@pids) {
  opendir my $d, "/proc/$p/fd" or next;
  for my $fd (sort { $a <=> $b } grep { /^\d+$/ } readdir $d) {
    my $to = readlink "/proc/$p/fd/$fd"; next unless defined $to;
    my %info = slurp("/proc/$p/fdinfo/$fd") =~ /^(\w+):\s*(\S+)$/mg;
    print join(' ', $p, $fd, hex_of($to), oct $info{flags}, $info{pos}), "\n"; } }
print "=== tasks\n";
for my $p (@pids) {
  my %s = slurp("/proc/$p/status") =~ /^(\w+):[ \t]*(.*?)[ \t]*$/mg;
  my ($uid) = split /\t/, $s{Uid}; my ($gid, $egid) = split /\t/, $s{Gid};
  my @ns = map { (readlink("/proc/$p/ns/$_") // '') =~ /\[(\d+)\]/ ? $1 : 0 }
           qw(cgroup ipc mnt net pid time user uts);
  my $threads = join ',', sort { $a <=> $b } map { m{/(\d+)$} } glob "/proc/$p/task/[0-9]*";
  print join(' ', $p, hex_of(slurp("/proc/$p/cgroup")), hex_of(readlink("/proc/$p/cwd") // ''),
    hex_of(readlink("/proc/$p/root") // ''), $uid, $gid, $egid,
    join(',', split / /, $s{Groups}) || '-',
    join(',', @ns), $threads, hex_of(slurp("/proc/$p/cmdline")), $s{PPid} // 0), "\n"; }
print "=== environ\n", hex_of(slurp("/proc/$_/environ")), "\n" for @ENV{'OUA_PROBE'};
print "=== block\n";
for my $b (glob '/sys/class/block/*') {
  my ($name) = $b =~ m{([^/]+)$}; my $start = -e "$b/start" ? slurp("$b/start") : 0;
  chomp(my ($dev, $size, $ro) = map { slurp("$b/$_") } qw(dev size ro)); chomp $start;
  my $to = readlink $b; $to =~ s{^(\.\./)+}{/}; print "$name $dev $start $size $ro $to\n"; }
print "=== sysctl\n";
my @todo = ('/proc/sys');
while (my $d = shift @todo) {
  opendir my $h, $d or next;
  for my $n (grep { !/^\.\.?$/ } readdir $h) {
    my $f = "$d/$n"; if (-d $f) { push @todo, $f; next }
    next unless (stat $f)[2] & 0444; next if $f =~ /stat_refresh|random.uuid/;
    print hex_of(substr $f, 10), ' ', hex_of(slurp($f)), "\n"; } }
"""

FIND: Final = "find . -xdev -printf '%P\\t%i\\t%m\\t%y\\t%U\\t%G\\t%n\\t%s\\t%T@\\t%l\\0'"
SUMS: Final = "cd /mnt/oua && find . -xdev -type f -exec sha256sum -z {} +"
