#!/usr/bin/env bash
# systemd does not restart a service with Restart=on-failure after SIGHUP.
#
# Seen with   systemd 252 (Debian 12)
# Behaviour   A process that ends by SIGHUP, SIGINT or SIGTERM counts as a clean exit, whoever sent
#             the signal: the unit becomes inactive, not failed, and is not restarted. SIGKILL
#             and SIGSEGV count as failures, and the unit is restarted.
# Operators   "kill -HUP", which reloads many daemons, ends one that does not handle it, and
#             "systemctl --failed" shows nothing. An identity agent needs Restart=always.
# renewd      reloads its configuration at SIGHUP (internal/cli), and its units have Restart=always
#             (deploy/).
#
# Output seen
#   HUP: inactive, restarts 0
#   INT: inactive, restarts 0
#   TERM: inactive, restarts 0
#   KILL: active, restarts 1
#   SEGV: active, restarts 1
source "$(dirname "$0")/lib.sh"
systemd_root
cat >root/etc/systemd/system/daemon@.service <<'UNIT'
[Unit]
StartLimitIntervalSec=0
[Service]
ExecStart=/bin/sleep infinity
Restart=on-failure
RestartSec=100ms
UNIT
systemd_run <<'CHECK'
for signal in HUP INT TERM KILL SEGV; do
	unit=daemon@$signal.service
	systemctl start $unit
	systemctl kill --kill-whom=main --signal=$signal $unit
	for i in $(seq 100); do
		active=$(systemctl show --value -p ActiveState $unit)
		restarts=$(systemctl show --value -p NRestarts $unit)
		[ "$active" != inactive ] && [ "$active $restarts" != "active 1" ] || break
		sleep 0.1
	done
	echo "$signal: $active, restarts $restarts"
done
CHECK
expect <<'SEEN'
HUP: inactive, restarts 0
INT: inactive, restarts 0
TERM: inactive, restarts 0
KILL: active, restarts 1
SEGV: active, restarts 1
SEEN
