# Verifies what was applied and leaves an attestation of it; the guest's own shell runs it in one
# command with the actions (verify.py). Before this stand: id, serviced, units; the words after the
# script are the beginning of the attestation.
state=/var/lib/ouassister
IFS=; words=$*; unset IFS # one text again
audit() { # of the package database: what dpkg says, line by line
	said=$(LC_ALL=C dpkg --audit 2>&1 </dev/null)
	code=$?
	echo "v audit $code"
	[ -z "$said" ] || printf '%s\n' "$said" | while IFS= read -r line; do
		printf 'v audit: %s\n' "$line"
	done
	[ $code -eq 0 ] && [ -z "$said" ]
}
draft() { # under a name that is not yet the attestation's
	printf '%s"applied_at_s":%s,"checks":{"files":"clean","marker":"%s","package_database":"%s",' \
		"$words" "$applied" "$1" "$2"
	printf '"units":"%s"},"result":"%s"}\n' "$3" "$4"
} >"$state/attestation.new"
begin() { # what needs no answer of the actions goes on beside them
	marker='not clean' applied=null found=
	read -r found stamp 2>/dev/null <"$state/applied"
	[ "$found" != "$id" ] || marker=clean
	case ${stamp:-x} in *[!0-9]*) ;; *) applied=$stamp ;; esac
	echo "v marker $marker"
	[ -z "$serviced" ] || [ -d /run/systemd/system ] || serviced=
	hoped=clean
	[ -n "$serviced" ] || hoped='not asked'
	audit &
	audited=$!
	{ umask 077 && draft clean clean "$hoped" verified && sync "$state/attestation.new"; } 2>/dev/null &
	drafted=$!
}
ask() { # units that have failed, or that fail and are started again and again
	failed=$(LC_ALL=C systemctl list-units --plain --no-legend --full --state=failed \
		--state=auto-restart 2>/dev/null </dev/null)
	code=$?
	echo "v units $code"
	[ $code -eq 0 ] || health='not known'
	set --
	while read -r unit _load active _rest; do
		[ -n "$unit" ] || continue
		set -- "$@" "$unit"
		printf 'v unit %s\n' "$unit"
		case " $units " in *" $unit "*) health='not clean' ;; esac
	done <<-END
		$failed
	END
	[ $# -eq 0 ] || systemctl show -p InactiveEnterTimestampMonotonic -- "$@" 2>/dev/null |
		while read -r line; do [ -z "$line" ] || printf 'v since %s\n' "${line#*=}"; done
}
begun=$state/begun # what was begun before the gate and goes on
told() { # a line there has this word in front
	while read -r word _; do [ "$word" != "$1" ] || return 0; done 2>/dev/null <"$begun"
	return 1
}
settled() { # these actions are done, and what ran replaced files has ended
	for number; do told "$number" || return 1; done
	for pid in $pids; do [ ! -e "/proc/$pid" ] || return 1; done
}
await() { until told end || settled "$@"; do sleep 0.1; done; }
await_worker() {
	until told end || [ ! -e "/proc/$1" ]; do sleep 0.2; done
	cat "$begun"
	rm -f "$begun"
}
finish() {
	health=$hoped
	[ -z "$serviced" ] || ask
	database=clean result=verified
	wait "$audited" || database='not clean'
	wait "$drafted"
	made=$?
	case $marker$database$health in *'not clean'* | *'not known'*)
		result='not verified'
		draft "$marker" "$database" "$health" "$result" && sync "$state/attestation.new"
		made=$?
		;;
	esac
	[ $made -eq 0 ] && mv "$state/attestation.new" "$state/attestation.json" && sync "$state"
	echo "v attested $?"
}
