# Functions for the scripts of this directory. Sourcing it changes to a temporary
# directory, which is removed at the end. The processes of the script end as well.

set -euo pipefail

work=$(mktemp -d)
finish() {
	if [ -e "$work/pids" ]; then
		kill $(cat "$work/pids") 2>/dev/null || true
		wait 2>/dev/null || true
	fi
	cd /
	rm -rf "$work"
}
trap finish EXIT
cd "$work"

# background LOG COMMAND... runs a program until the script ends.
background() {
	local log=$1
	shift
	"$@" >"$log" 2>&1 &
	echo $! >>"$work/pids"
}

# free_port prints a free TCP port of the loopback interface.
free_port() {
	need python3 python3
	python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# need PROGRAM PACKAGE ends the script if the program is missing, and names its Debian
# package.
need() {
	command -v "$1" >/dev/null && return
	echo "$1 is missing: install $2" >&2
	exit 1
}

# go_module MODULE@VERSION... makes this directory a Go module with these dependencies.
go_module() {
	need go "Go 1.26 or later"
	export GOFLAGS=-mod=mod GOWORK=off
	[ -e go.mod ] || go mod init finding 2>/dev/null
	go get "$@" 2>get.log || { cat get.log >&2; exit 1; }
}

# spire VERSION adds spire-server and spire-agent of a release to PATH: those of
# SPIRE_BIN_DIR if they have that version, or built from the Go module, which takes a
# quarter of an hour the first time.
spire() {
	local dir=${SPIRE_BIN_DIR:-} ejbca=github.com/Keyfactor/ejbca-go-client-sdk
	case $("${dir:-$work}/spire-server" --version 2>&1) in
	"$1"*) ;;
	*)
		dir=$work
		# A dependency of a plugin that no script uses. Not every module proxy has the
		# version that releases since 1.15 require.
		go mod init finding 2>/dev/null
		go mod edit -replace="$ejbca=$ejbca@v1.0.2"
		go_module -tool "github.com/spiffe/spire/cmd/spire-server@v$1" "github.com/spiffe/spire/cmd/spire-agent@v$1"
		GOBIN=$work go install github.com/spiffe/spire/cmd/spire-server github.com/spiffe/spire/cmd/spire-agent
		;;
	esac
	PATH=$dir:$PATH
}

# until_true SECONDS COMMAND... repeats a command until it succeeds.
until_true() {
	local end=$((SECONDS + $1))
	shift
	until "$@" >/dev/null 2>&1; do
		if [ $SECONDS -ge $end ]; then
			echo "not in time: $*" >&2
			exit 1
		fi
		sleep 0.2
	done
}

# expect compares the file "seen" with its standard input.
expect() {
	cat >expected
	cat seen
	if ! diff -u expected seen >changed; then
		echo "The behaviour has changed:" >&2
		cat changed >&2
		exit 1
	fi
}

# spire_conf NAME [PLUGIN] writes $work/NAME.conf, the configuration of a SPIRE server for
# example.org, and its port to $work/NAME.port.
spire_conf() {
	free_port >"$1.port"
	cat >"$1.conf" <<CONF
server {
	bind_address = "127.0.0.1"
	bind_port = "$(cat "$1.port")"
	trust_domain = "example.org"
	data_dir = "$work/$1"
	socket_path = "$work/$1.sock"
	log_level = "WARN"
}
plugins {
	DataStore "sql" { plugin_data { database_type = "sqlite3" connection_string = "$work/$1.sqlite3" } }
	NodeAttestor "join_token" { plugin_data {} }
	KeyManager "memory" { plugin_data {} }
	${2:-}
}
CONF
}

# spire_server NAME [PLUGIN] starts a SPIRE server for example.org and waits until it
# answers.
spire_server() {
	spire_conf "$@"
	background "$1.log" spire-server run -config "$1.conf"
	until_true 60 spire-server healthcheck -socketPath "$work/$1.sock"
}

# nested_under NAME prints the plugin of a SPIRE server nested under that one, with an
# SVID from spire_agent.
nested_under() {
	echo "UpstreamAuthority \"spire\" { plugin_data { server_address = \"127.0.0.1\" server_port = \"$(cat "$1.port")\" workload_api_socket = \"$work/agent.sock\" } }"
}

# json EXPRESSION prints a Python expression of the JSON document "doc" on standard input.
json() {
	need python3 python3
	python3 -c "import json, sys; doc = json.load(sys.stdin); print($1)"
}

# api NAME COMMAND... runs a command of spire-server against a started server.
api() {
	local socket=$work/$1.sock
	shift
	spire-server "$@" -socketPath "$socket"
}

# spire_agent NAME starts a SPIRE agent with the alias spiffe://example.org/node for that
# server, and waits until it has an SVID for this user. Its Workload API is at
# $work/agent.sock.
spire_agent() {
	api "$1" bundle show >bundle.pem
	cat >agent.conf <<CONF
agent {
	trust_domain = "example.org"
	server_address = "127.0.0.1"
	server_port = "$(cat "$1.port")"
	data_dir = "$work/agent"
	socket_path = "$work/agent.sock"
	trust_bundle_path = "$work/bundle.pem"
	log_level = "WARN"
}
plugins {
	KeyManager "memory" { plugin_data {} }
	NodeAttestor "join_token" { plugin_data {} }
	WorkloadAttestor "unix" { plugin_data {} }
}
CONF
	background agent.log spire-agent run -config agent.conf \
		-joinToken "$(api "$1" token generate -spiffeID spiffe://example.org/node | sed -n 's/^Token: //p')"
	until_true 60 spire-agent api fetch x509 -socketPath "$work/agent.sock"
}

# systemd_root makes root/ the root directory of a container with this machine's /usr.
systemd_root() {
	local dir
	need systemd-nspawn systemd-container
	[ "$(id -u)" = 0 ] || { echo "a container with systemd takes root" >&2; exit 1; }
	mkdir -p root/{usr,proc,sys,dev,run,tmp,out,var,etc/systemd/system}
	for dir in bin sbin lib lib64; do
		[ ! -L /$dir ] || ln -s "$(readlink /$dir)" root/$dir
	done
	cp /etc/os-release root/etc/
	echo 0123456789abcdef0123456789abcdef >root/etc/machine-id
	echo root:x:0:0:root:/root:/bin/sh >root/etc/passwd
	echo root:x:0: >root/etc/group
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
}

# systemd_run boots systemd in root/, runs the commands of standard input there, and writes
# their output to the file "seen".
systemd_run() {
	local options="--quiet --directory=$work/root --bind-ro=/usr --machine=finding-$$ --private-network --register=no --link-journal=no --settings=no --console=pipe"
	[ -e /run/systemd/system ] || options="$options --keep-unit" # no scope without systemd
	cat >root/out/check.sh
	timeout 120 systemd-nspawn $options --boot systemd.unit=check.service >boot.log 2>&1 </dev/null || true
	if [ ! -e root/out/seen ]; then
		echo "systemd cannot be booted here:" >&2
		cat boot.log >&2
		exit 1
	fi
	cp root/out/seen seen
}
