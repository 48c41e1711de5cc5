#!/usr/bin/env bash
# An older systemd starts a unit with Type=notify-reload as Type=simple.
#
# Seen with   systemd 252 (Debian 12)
# Behaviour   systemd 253 introduced this type. An older one ignores the line with a warning, and
#             the default is simple: the service counts as started before it is ready, and
#             "systemctl reload" is refused. "systemd-analyze verify" exits with 0.
# Operators   If you take over a unit from a newer distribution, the services that are ordered after
#             an agent start without its socket. Look at "systemctl show -p Type".
# renewd      has Type=notify with ExecReload= in its units (deploy/).
#
# Output seen
#   Type=notify: verify exits with 0, it is notify, ready when started: yes, reload exits with 0
#   /etc/systemd/system/notify-reload.service:2: Failed to parse service type, ignoring: notify-reload
#   Type=notify-reload: verify exits with 0, it is simple, ready when started: no, reload exits with 3
source "$(dirname "$0")/lib.sh"
systemd_root
# The daemon takes two seconds until it is ready, and has nothing to do at SIGHUP.
cat >root/out/daemon.sh <<'DAEMON'
trap : HUP
sleep 2
touch /run/$1.ready
systemd-notify --ready
while :; do sleep 1; done
DAEMON
for type in notify notify-reload; do
	cat >root/etc/systemd/system/$type.service <<UNIT
[Service]
Type=$type
NotifyAccess=all
ExecStart=/bin/bash /out/daemon.sh $type
UNIT
done
echo 'ExecReload=kill -HUP $MAINPID' >>root/etc/systemd/system/notify.service
systemd_run <<'CHECK'
for type in notify notify-reload; do
	systemd-analyze verify /etc/systemd/system/$type.service
	verified=$?
	systemctl start $type
	ready=no
	[ ! -e /run/$type.ready ] || ready=yes
	systemctl reload $type 2>/dev/null
	reloaded=$?
	echo "Type=$type: verify exits with $verified, it is $(systemctl show --value -p Type $type), ready when started: $ready, reload exits with $reloaded"
done
CHECK
expect <<'SEEN'
Type=notify: verify exits with 0, it is notify, ready when started: yes, reload exits with 0
/etc/systemd/system/notify-reload.service:2: Failed to parse service type, ignoring: notify-reload
Type=notify-reload: verify exits with 0, it is simple, ready when started: no, reload exits with 3
SEEN
