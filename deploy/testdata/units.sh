# Runs as root in a container with systemd: the commands of deploy/README.md
# (readme.sh), then events in the life of a machine.
set -euo pipefail
touch /out/began
cd /src

fail() { echo "FAIL: $*"; exit 1; }
ok() { "$@" || fail "$*"; }
not() { if "$@"; then fail "succeeded: $*"; fi; }
until_ok() { # COMMAND...
	local deadline=$((SECONDS + 90))
	until "$@" >/out/last 2>&1; do
		[ $SECONDS -lt $deadline ] || { cat /out/last; fail "not within 90 s: $*"; }
		sleep 0.1
	done
}
as() { local user=$1; shift; setpriv --reuid "$user" --regid "$user" --init-groups -- "$@"; }
property() { systemctl show -P "$1" "$2"; }
in_journal() { grep -q -- "$3" <(journalctl -u "$1" -p "$2" -o cat); }
journal_has() { until_ok in_journal "$@"; } # UNIT PRIORITY TEXT

echo "== the commands of README.md"
. ./readme.sh

echo "== workloads of several users; their selectors need /proc and the executable"
until_ok renewd-agent healthcheck
until_ok as web renewd-agent fetch x509
not as nobody renewd-agent fetch x509
journal_has renewd-agent info '"path":"/usr/local/bin/renewd-agent"'
cat >>/etc/renewd/entries.yaml <<END
  - id: by-hash
    spiffe_id: spiffe://example.org/by-hash
    selectors:
      - unix:user:nobody
      - unix:sha256:$(sha256sum /usr/local/bin/renewd-agent | cut -d' ' -f1)
END
ok renewd-server entries apply /etc/renewd/entries.yaml
until_ok as nobody renewd-agent fetch x509
rm /etc/renewd/join_token

echo "== operators: root, and members of the socket's group if the configuration has that"
not as ops keysetctl list
sed -i 's/^    - unix:uid:0$/&\n    - unix:group:renewd-server/' /etc/renewd/server.yaml
usermod -aG renewd-server ops
# A command right after the restart reaches the socket.
systemctl restart renewd-server
ok as ops keysetctl list

echo "== a rotation"
OLD=$(keysetctl list -o json | grep -o 'ks_[a-z0-9]*' | head -1)
NEW=$(as ops keysetctl prepare | grep -o 'ks_[a-z0-9]*')
applied() { keysetctl list -o json | grep -q '"agents_behind": 0'; }
until_ok applied
# A workload that fetches continuously always has an SVID.
(while [ ! -e /out/stop ]; do as web renewd-agent fetch x509 >/dev/null 2>>/out/denied || true; sleep 0.1; done) &
ok as ops keysetctl activate "$NEW"
ok as ops keysetctl taint "$OLD"
ok as ops keysetctl wait "$OLD"
ok as ops keysetctl remove "$OLD"
touch /out/stop
wait
[ ! -s /out/denied ] || fail "a workload had no SVID: $(cat /out/denied)"
not grep -q "$OLD" <(keysetctl list)

if [ -e /usr/lib/systemd/system/dbus.socket ]; then
	echo "== a service by its unit, whatever its user; the bus is restarted meanwhile"
	printf 'workload_attestation:\n  systemd:\n    enabled: true\n' >>/etc/renewd/agent.yaml
	lacks() { grep -q "^warning: .*$1" <(as renewd renewd-agent config check --config /etc/renewd/agent.yaml 2>&1); }
	not lacks systemd
	cat >>/etc/renewd/entries.yaml <<END
  - id: shop
    spiffe_id: spiffe://example.org/shop
    selectors:
      - systemd:id:shop.service
      - systemd:fragment_path:/etc/systemd/system/shop.service
END
	ok renewd-server entries apply /etc/renewd/entries.yaml
	printf '[Service]\nType=oneshot\nDynamicUser=yes\nExecStart=/usr/local/bin/renewd-agent fetch x509\n' >/etc/systemd/system/shop.service
	systemctl daemon-reload
	not systemctl start shop
	ok systemctl restart renewd-agent
	until_ok systemctl start shop
	systemctl restart dbus
	ok systemctl start shop
	journal_has shop info 'spiffe://example.org/shop'
	systemd-run -q --unit=cart sleep infinity
	attested() { renewd-agent attest "$(property MainPID cart)" -o json >/out/attested && grep -q "$1" /out/attested; }
	ok attested '"systemd:id:cart.service"'
	ok attested '"systemd:fragment_path:/run/systemd/transient/cart.service"'
	ok attested '"outcome": "denied"'
	not as renewd-server renewd-agent attest 1
	if [ -x /src/spire/spire-agent ]; then
		echo "== its selectors, byte for byte beside those of spire-agent"
		install -d -m 0755 /run/spire
		cat >/run/spire/server.conf <<END
server {
  bind_address = "127.0.0.1"
  bind_port = "8090"
  trust_domain = "spire.example"
  data_dir = "/run/spire"
  socket_path = "/run/spire/server.sock"
}
plugins {
  DataStore "sql" { plugin_data { database_type = "sqlite3" connection_string = "/run/spire/db" } }
  NodeAttestor "join_token" { plugin_data {} }
  KeyManager "memory" { plugin_data {} }
}
END
		cat >/run/spire/agent.conf <<END
agent {
  data_dir = "/run/spire"
  log_level = "DEBUG"
  log_file = "/run/spire/log"
  server_address = "127.0.0.1"
  server_port = "8090"
  socket_path = "/run/spire/agent.sock"
  insecure_bootstrap = true
  trust_domain = "spire.example"
}
plugins {
  NodeAttestor "join_token" { plugin_data {} }
  KeyManager "memory" { plugin_data {} }
  WorkloadAttestor "unix" { plugin_data { discover_workload_path = true } }
  WorkloadAttestor "systemd" { plugin_data {} }
}
END
		systemd-run -q --unit=spire-server /src/spire/spire-server run -config /run/spire/server.conf
		until_ok /src/spire/spire-server healthcheck -socketPath /run/spire/server.sock
		TOKEN=$(/src/spire/spire-server token generate -socketPath /run/spire/server.sock -output json | grep -o '"value":"[^"]*"' | cut -d'"' -f4)
		systemd-run -q --unit=spire-agent /src/spire/spire-agent run -config /run/spire/agent.conf -joinToken "$TOKEN"
		until_ok /src/spire/spire-agent healthcheck -socketPath /run/spire/agent.sock
		systemd-run -q --unit=twin --uid=web /src/spire/spire-agent api watch -socketPath /run/spire/agent.sock
		theirs() { grep 'PID attested to have selectors' /run/spire/log | grep "pid=$(property MainPID twin) " >/out/theirs; }
		until_ok theirs
		# In that log: selectors="[type:\"unix\" value:\"uid:1001\" type:...]", with one or two spaces.
		head -1 /out/theirs | grep -o 'type:[^]]*' | sed 's/ type:/\ntype:/g' | sed 's/^type:\\"\([a-z]*\)\\"  *value:\\"\(.*\)\\"$/\1:\2/' | sort >/out/theirs.sorted
		renewd-agent attest "$(property MainPID twin)" -o json | grep -o '^ *"\(unix\|systemd\):.*"' | sed 's/^ *"//; s/"$//' | sort >/out/ours.sorted
		ok diff /out/ours.sorted /out/theirs.sorted
		ok grep -qx systemd:fragment_path:/run/systemd/transient/twin.service /out/ours.sorted
		systemctl stop twin spire-agent spire-server
	fi
	systemctl stop dbus.socket dbus
	ok attested '"outcome": "unavailable"'
	ok lacks 'systemd.enabled: true cannot work on this machine; .*: start D-Bus'
	systemctl start dbus.socket
	systemctl stop cart
fi

echo "== restarted after any signal except SIGHUP, which is ignored"
restarted() { # PID 0: no process
	local now=$(property MainPID $UNIT)
	[ "$now" != 0 ] && [ "$now" != "$PID" ] && [ "$(property ActiveState $UNIT)" = active ]
}
for UNIT in renewd-agent renewd-server; do
	for SIGNAL in KILL TERM QUIT; do # QUIT ends a Go program like a crash
		PID=$(property MainPID $UNIT)
		kill -HUP "$PID"
		sleep 0.1
		kill -$SIGNAL "$PID"
		until_ok restarted
	done
	journal_has $UNIT warning 'SIGHUP ignored'
done

echo "== a restart while the server is down: workloads keep their SVIDs, without a join token"
systemctl stop renewd-server
systemctl restart renewd-agent
ok as web renewd-agent fetch x509
journal_has renewd-agent warning 'entry sync failed'

echo "== a store key without encryption"
install -d /etc/systemd/system/renewd-server.service.d
printf '[Service]\nLoadCredentialEncrypted=\nLoadCredential=renewd-store-key:/etc/renewd/store.key\n' >/etc/systemd/system/renewd-server.service.d/key.conf
install -m 0600 /root/store.key /etc/renewd/store.key
systemctl daemon-reload
ok systemctl start renewd-server
ok renewd-server health

echo "== permanent errors are reported at once and not retried"
rm -f /root/other.key
renewd-server key new /root/other.key
install -m 0600 /root/other.key /etc/renewd/store.key
not systemctl restart renewd-server
[ "$(property ExecMainStatus renewd-server)" = 2 ] || fail "status $(property ExecMainStatus renewd-server)"
journal_has renewd-server err 'not sealed with this encryption key'
sed -i 's/^trust_domain/trust_domian/' /etc/renewd/agent.yaml
not systemctl restart renewd-agent
[ "$(property ExecMainStatus renewd-agent)" = 2 ] || fail "status $(property ExecMainStatus renewd-agent)"
journal_has renewd-agent err 'did you mean trust_domain'
sleep 3 # longer than RestartSec
for unit in renewd-agent renewd-server; do
	[ "$(property ActiveState $unit)" = failed ] || fail "$unit is $(property ActiveState $unit)"
done

echo "== errors corrected"
sed -i 's/^trust_domian/trust_domain/' /etc/renewd/agent.yaml
install -m 0600 /root/store.key /etc/renewd/store.key
ok systemctl start renewd-agent renewd-server
until_ok renewd-agent healthcheck

echo "== restarted often, without a limit"
for _ in 1 2 3 4 5 6; do systemctl restart renewd-agent; done
UNIT=renewd-agent
PID=$(property MainPID $UNIT)
kill -9 "$PID"
until_ok restarted

echo "== stopped: the SVIDs in memory are deleted"
systemctl stop renewd-agent
not test -e /run/renewd
echo "== done"
