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
need systemd-nspawn systemd-container
[ "$(id -u)" = 0 ] || { echo "a container with systemd takes root" >&2; exit 1; }
root=$work/root
mkdir -p root/{usr,proc,sys,dev,run,tmp,out,var,etc/systemd/system}
for dir in bin sbin lib lib64; do
	[ ! -L /$dir ] || ln -s "$(readlink /$dir)" root/$dir
done
cp /etc/os-release root/etc/
echo 0123456789abcdef0123456789abcdef >root/etc/machine-id
echo root:x:0:0:root:/root:/bin/sh >root/etc/passwd
echo root:x:0: >root/etc/group
cat >root/etc/systemd/system/daemon@.service <<'UNIT'
[Unit]
StartLimitIntervalSec=0
[Service]
ExecStart=/bin/sleep infinity
Restart=on-failure
RestartSec=100ms
UNIT
cat >root/etc/systemd/system/check.service <<'UNIT'
[Unit]
After=basic.target
SuccessAction=exit-force
FailureAction=exit-force
[Service]
Type=oneshot
ExecStart=/bin/bash /out/check.sh
StandardOutput=file:/out/seen
StandardError=inherit
UNIT
cat >root/out/check.sh <<'CHECK'
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
options="--quiet --directory=$root --bind-ro=/usr --machine=finding-$$ --private-network --register=no --link-journal=no --settings=no --console=pipe"
[ -e /run/systemd/system ] || options="$options --keep-unit"
timeout 120 systemd-nspawn $options --boot systemd.unit=check.service >boot.log 2>&1 </dev/null || true
if [ ! -e root/out/seen ]; then
	echo "systemd cannot be booted here:" >&2
	cat boot.log >&2
	exit 1
fi
cp root/out/seen seen
expect <<'SEEN'
HUP: inactive, restarts 0
INT: inactive, restarts 0
TERM: inactive, restarts 0
KILL: active, restarts 1
SEGV: active, restarts 1
SEEN
