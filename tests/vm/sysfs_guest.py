"""What runs inside the guest for `test_sysfs`: all of /sys and /dev, as the guest shows them."""

from __future__ import annotations

from typing import Final

# A line for each file: path, mode, owner, links, number, size, device, and in hexadecimal what a
# link leads to or a file contains. A file that cannot be read has a dash there. What is mounted
# below is not entered.
LIVE: Final = r"""use strict; $| = 1;
sub slurp { sysopen my $f, $_[0], 0 or return undef; my $all = ''; my $t;
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
show('/sys', (lstat '/sys')[0], 1); show('/dev', (lstat '/dev')[0], 0);
"""
