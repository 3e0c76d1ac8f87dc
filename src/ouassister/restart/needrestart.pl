# Prints which of the units named as arguments the guest's needrestart would leave alone, one a
# line: unit, tab, rule. Its configuration is a Perl program (needrestart.conf), so Perl reads it.
use strict;
use warnings;
our %nrconf = (blacklist_rc => [], override_rc => {});
my $file = '/etc/needrestart/needrestart.conf';
exit 0 unless -e $file;
do $file;
for my $unit (@ARGV) {
    (my $name = $unit) =~ s/\.service$//;
    for my $rule (@{ $nrconf{blacklist_rc} || [] }) {
        if ($unit =~ /$rule/ || $name =~ /$rule/) { print "$unit\t$rule\n"; last; }
    }
    for my $rule (sort keys %{ $nrconf{override_rc} || {} }) {
        next unless $unit =~ /$rule/ || $name =~ /$rule/;
        print "$unit\t$rule\n" unless $nrconf{override_rc}{$rule};
        last;
    }
}
