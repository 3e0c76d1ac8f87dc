# Installs staged packages; the guest's own shell runs it, apart from the agent (staged.py). Before
# this stand: state, limit, folder, names and pids, and the functions steps and marks.
umask 022
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 HOME=/root
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
end=$(($(date +%s) + limit))
: >"$state/log"
late() { echo 'dpkg: error: the time limit ran out' >>"$state/log"; }
step() { # one call of dpkg, in what is left of the time; who has its lock is waited for
	tries=0
	while :; do
		left=$((end - $(date +%s)))
		[ "$left" -gt 0 ] || { late; return 124; }
		timeout -k 10 "$left" dpkg --force-confdef --force-confold "$@" \
			</dev/null >"$state/step" 2>&1
		code=$?
		cat "$state/step" >>"$state/log"
		[ $code -ne 0 ] || return 0
		[ $code -ne 124 ] || late
		tries=$((tries + 1))
		grep -q 'was locked by another process' "$state/step" && [ $tries -lt 60 ] || return $code
		sleep 1
	done
}
running() { # which of the processes are there
	for pid in $pids; do [ ! -d "/proc/$pid" ] || echo "$1 $pid"; done
}
before=$(running before)
result=0
if [ -d "$folder" ]; then # else an earlier resume has done it
	{ cd "$folder" && steps; } || result=$?
	cd /
	[ $result -ne 0 ] || marks </dev/null >>"$state/log" 2>&1 || result=$?
fi
{
	echo "code $result"
	dpkg-query -W -f '${Package} ${Architecture} ${Version} ${db:Status-Status}\n' $names \
		2>/dev/null | sed 's/^/state /'
	echo "$before"
	running alive
	[ $result -eq 0 ] || tail -c 16000 "$state/log" | sed 's/^/log /'
	echo end
} >"$state/new"
if [ $result -eq 0 ]; then
	rm -rf "$folder"
	rmdir "${folder%/*}" 2>/dev/null # others may be in it
fi
mv "$state/new" "$state/told"
