#!/bin/sh
# Stands in for programs that act on the running system by other ways than its service manager:
# writes down the call, one line, and says that it went well. Questions, and what works on files
# alone, go to the guest's own program. The guest's own shell runs this, in the shadow.
name=${0##*/}
tab='	'
PATH=${PATH#/run/ouassister/bin:}
if ! command -v "$name" >/dev/null; then # the guest has no such program
	echo "$name: not found" >&2
	exit 127
fi
record() { # package, script, name, words; read by servicemanager/recorders.py
	line=$DPKG_MAINTSCRIPT_PACKAGE$tab$DPKG_MAINTSCRIPT_NAME$tab$name
	for word in "$@"; do line=$line$tab$word; done
	printf '%s\n' "$line" >/run/ouassister/record
}
case $name in
grub-mkconfig) # update-grub calls it by its name alone, whatever update-grub itself was called by
	case " $* " in
	*" -o"* | *" --output"*) ;;
	*) exec "$name" "$@" ;;
	esac
	;;
modprobe)
	for word in "$@"; do
		case $word in
		-n | --dry-run | --show | -D | --show-depends | -R | --resolve-alias | -c | --showconfig | \
		--show-modversions | --dump-modversions | -V | --version | -h | --help)
			exec "$name" "$@" ;;
		esac
	done
	;;
sysctl)
	writes=
	for word in "$@"; do
		case $word in
		-w | --write | -p* | --load* | --system | *=*) writes=yes ;;
		esac
	done
	[ "$writes" ] || exec "$name" "$@"
	;;
udevadm)
	case $1 in
	control | trigger | settle) ;;
	*) exec "$name" "$@" ;;
	esac
	;;
systemd-tmpfiles) # makes files now, for the scripts that follow, and those of /run in the guest
	"$name" "$@" || exit
	for word in "$@"; do
		case $word in
		--root=* | --image=* | --cat-config | --version | --help | -h) exit 0 ;;
		esac
	done
	;;
esac
record "$@"
exit 0
