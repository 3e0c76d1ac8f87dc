#!/bin/sh
# Stands in for programs that act on the running system: writes down the call, one line, words
# separated by tabs, and says that it went well. The guest's own shell runs it, in the shadow.
name=${0##*/}
record() {
	line=$name
	for word in "$@"; do line="$line	$word"; done
	printf '%s\n' "$line" >>/run/ouassister/log/events
}
real() { # what works on files alone is done by the guest's own program, now
	PATH=${PATH#/run/ouassister/bin:} SYSTEMD_OFFLINE=1 exec "$name" "$@"
}
case $name in
systemctl)
	verb=
	for word in "$@"; do
		case $word in
		-*) ;;
		*) verb=$word; break ;;
		esac
	done
	case $verb in
	daemon-reload | daemon-reexec | start | stop | restart | try-restart | reload | kill | \
	reload-or-restart | try-reload-or-restart | reset-failed | isolate)
		record "$@" ;;
	is-active | is-failed | is-system-running | show | status | list-units)
		record "$@"
		echo unknown
		exit 4 ;; # LSB: "program or service status is unknown"
	*) real "$@" ;;
	esac
	;;
*) record "$@" ;;
esac
exit 0
