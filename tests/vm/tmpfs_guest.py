"""What is put into tmpfs inside a guest, and what the guest and its shadow say of it."""

from __future__ import annotations

from typing import Final, NamedTuple

TOPS: Final = ("/run", "/tmp", "/dev/shm", "/srv/memory")  # noqa: S108 - the guest's
MADE: Final = tuple(f"{top}/oua" for top in TOPS)
LARGE: Final = "/dev/shm/large"  # noqa: S108
SWAPPED: Final = "/dev/shm/swapped"  # noqa: S108
LEFT_OUT: Final = frozenset((LARGE, SWAPPED))

PREPARE: Final = f"""set -e
mount -t tmpfs -o mode=1777,size=40%,nr_inodes=7k,nosuid,nodev,noexec tmpfs /tmp
dd if=/dev/zero of=/swap bs=1M count=40 status=none; chmod 600 /swap
mkswap /swap >/dev/null; swapon /swap
systemd-run -q --wait -p MemoryMax=8M /bin/dd if=/dev/urandom of={SWAPPED} bs=64k count=384
head -c 66M /dev/zero >{LARGE}
perl /root/make.pl {" ".join(MADE)}
"""

MAKE: Final = r"""use strict; use Socket;
sub attribute { my ($path, $key, $value) = @_;
  syscall(188, $path, $key, $value, length $value, 0); } # setxattr; old kernels have no user.*
sub put { open my $f, '>', $_[0] or die "$_[0]: $!"; print $f $_[1]; close $f or die $! }
for my $top (@ARGV) {
  mkdir $top or die; chdir $top or die;
  my $deep = ''; for (1 .. 40) { $deep .= "d/"; mkdir $deep or die "$deep $!"; }
  put($deep . 'bottom', 'x' x 5000);
  mkdir 'sticky'; chmod 03775, 'sticky'; chown 7, 8, 'sticky';
  put('private', "secret\n"); chmod 0400, 'private'; chown 1234, 65535, 'private';
  put('foreign', "x"); chown 70000, 70001, 'foreign';
  put('setuid', 'x'); chmod 04755, 'setuid';
  link 'private', 'sticky/hard' or die; link 'private', 'a-hard' or die;
  put("odd\n\e[31m..name \xff\\", "odd\n"); put('..hidden', ''); put('x' x 255, 'long');
  symlink '/etc/passwd', 'outside'; symlink '../../../../..', 'up'; symlink 'l' x 3000, 'long';
  symlink 'nowhere', 'dangling'; symlink '/proc/self/fd/3', 'magic';
  open my $h, '>', 'hole' or die; truncate $h, 1 << 33; seek $h, 5_000_000, 0; print $h "middle";
  seek $h, (1 << 33) - 3, 0; print $h 'end'; close $h;
  put('random', join '', map { chr rand 256 } 1 .. 77_777);
  system('mkfifo -m 620 fifo; mknod -m 600 char c 1 7; mknod block b 7 200; mknod null c 0 0');
  socket my $s, PF_UNIX, SOCK_STREAM, 0; bind $s, sockaddr_un('socket') or die $!; listen $s, 5;
  chmod 0666, 'socket';
  attribute('private', 'trusted.oua', "v\0x"); attribute('private', 'user.oua', 'plain');
  attribute('setuid', 'security.capability', pack 'L5', 0x02000001, 0x400, 0, 0, 0);
  attribute($_, 'system.posix_acl_access', pack 'L S2L S2L S2L S2L S2L', 2,
    1, 7, 0xffffffff, 2, 4, 1234, 4, 5, 0xffffffff, 16, 5, 0xffffffff, 32, 0, 0xffffffff)
    for 'setuid', 'sticky';
  utime 981173106, 981173106, 'sticky/hard';
  open my $gone, '>', 'deleted'; print $gone 'x'; unlink 'deleted';
}
chdir '/run/oua'; system("touch -h -d '2001-02-03 04:05:06.123456789' dangling fifo sticky");
"""

SHOW: Final = r"""use strict; chdir '/'; # a line for each file: as find, sha256sum and getfattr say
use Digest::SHA; my %sum; my @tops = grep { -d } @ARGV;
open my $find, '-|', 'find', @tops, '-printf',
  '%p\t%m\t%y\t%U\t%G\t%n\t%s\t%b\t%T@\t%l\0' or die; $/ = "\0";
while (my $line = <$find>) { chomp $line; my ($path, @rest) = split /\t/, $line, -1;
  my $list = "\0" x 65536; my $n = syscall(194, $path, $list, 65536); my @attributes;
  for my $key (sort split /\0/, substr $list, 0, $n > 0 ? $n : 0) {
    my $value = "\0" x 65536; my $size = syscall(192, $path, $key, $value, 65536);
    push @attributes, "$key=" . unpack 'H*', substr $value, 0, $size; }
  my ($rdev) = (lstat $path)[6]; my $sum = '';
  if ($rest[1] eq 'f' && $rest[5] < 1 << 30) { $/ = undef;
    $sum = Digest::SHA->new(256)->addfile($path)->hexdigest; $/ = "\0"; }
  $rest[8] = unpack 'H*', $rest[8];
  print join("\t", unpack('H*', $path), @rest, $rdev, $sum, "@attributes"), "\n"; }
"""


class Row(NamedTuple):
    """One file, every column as it was printed; the target is in hexadecimal."""

    mode: str
    kind: str
    uid: str
    gid: str
    links: str
    size: str
    blocks: str
    mtime: str
    target: str
    device: str
    sha256: str
    xattrs: str


def parse(text: str) -> dict[str, Row]:
    """Read what `SHOW` printed, by path."""
    rows = {}
    for line in text.splitlines():
        path, *columns = line.split("\t")
        rows[bytes.fromhex(path).decode("utf-8", "backslashreplace")] = Row(*columns)
    return rows


def expected(path: str, live: Row) -> Row:
    """What a file of the guest becomes in the view: all that differs, differs on purpose."""
    attributes = [one for one in live.xattrs.split(" ") if not one.startswith("trusted.")]
    row = live._replace(
        xattrs=" ".join(attributes),
        uid=live.uid if int(live.uid) < 65536 else "65534",
        gid=live.gid if int(live.gid) < 65536 else "65534",
    )
    if live.kind in "bc":
        row = row._replace(kind="c", device="0")
    if path == "/run":  # with a folder of ours in it
        row = row._replace(links=str(int(row.links) + 1), size=str(int(row.size) + 20))
    if path == "/dev/shm":  # noqa: S108 - without the two that are left out
        row = row._replace(size=str(int(row.size) - 40))
    if path.startswith("/run/credentials/") and row.kind == "d":  # a ramfs tells no size
        row = row._replace(size="40")
    return row
