#!/usr/bin/env bash
# With cgroup v1, a process whose main thread has ended is in no container, though it continues.
#
# Seen with   Linux 6.18, on a machine with hierarchies of cgroup v1 and v2
# Behaviour   The kernel moves an ending thread to the root of each v1 hierarchy, and /proc/PID/cgroup
#             is that of the main thread. It shows "/" for a zombie, and for a process that continues
#             after its main thread has ended. /proc/PID/task/TID/cgroup of a running thread is
#             correct. In the v2 hierarchy both keep their path.
# Operators   Attestors find the container in /proc/PID/cgroup. On a node with cgroup v1 such a daemon
#             has no pod or container, as a process of the host has none, and loses its k8s and docker
#             selectors. Nothing fails that could be tried again.
# renewd      finds no container either, which never gives more selectors than the truth
#             (internal/agent/attest/cgroup).
#
# Output seen
#   running: v1 /finding, v2 /finding
#   main thread has ended: v1 /, v2 /finding; kill -0: alive
#   its other thread: v1 /finding, v2 /finding
#   zombie: v1 /, v2 /finding
source "$(dirname "$0")/lib.sh"
need cc gcc
v1=$(awk '$3 == "cgroup" && $4 ~ /(^|,)memory/ {print $2; exit}' /proc/mounts)
v2=$(awk '$3 == "cgroup2" {print $2; exit}' /proc/mounts)
if [ -z "$v1" ] || [ -z "$v2" ] || [ "$(id -u)" != 0 ]; then
	echo "cgroup v1 or root is missing: boot with systemd.unified_cgroup_hierarchy=0, and run this as root" >&2
	exit 1
fi
cat >leader.c <<'C'
#include <pthread.h>
#include <unistd.h>

static void *work(void *arg) {
	pause();
	return arg;
}

int main(int argc, char **argv) {
	pthread_t t;
	if (argc > 1)
		pause();
	if (argc > 1 || pthread_create(&t, 0, work, 0))
		return 1;
	if (!fork())
		_exit(0); /* a zombie: nobody waits for it */
	pthread_exit(0);
}
C
cc -pthread -o leader leader.c
group=finding-$$
trap 'kill $(cat pids) 2>/dev/null; wait 2>/dev/null; sleep 0.5; rmdir "$v1/$group" "$v2/$group"; finish' EXIT
mkdir "$v1/$group" "$v2/$group"
# inside runs a program in both groups.
inside() {
	background leader.log sh -c 'echo $$ >"$0/cgroup.procs" && echo $$ >"$1/cgroup.procs" && shift && exec "$@"' "$v1/$group" "$v2/$group" "$@"
}
inside ./leader running
inside ./leader
running=$(sed -n 1p pids) ended=$(sed -n 2p pids)
is() { grep -q "^Name:.*leader" "/proc/$1/status" && grep -q "^State:.*$2" "/proc/$1/status"; }
until_true 10 is "$running" S
until_true 10 is "$ended" Z
zombie=$(pgrep -P "$ended")
until_true 10 is "$zombie" Z
other=$(ls "/proc/$ended/task" | grep -vx "$ended")
look() { sed -n -e 's/^[0-9]*:[a-z_,]*memory[a-z_,]*:/v1 /p' -e 's/^0::/v2 /p' "/proc/$1/cgroup" | sed "s/$group/finding/" | paste -sd , | sed 's/,/, /'; }
{
	echo "running: $(look "$running")"
	echo "main thread has ended: $(look "$ended"); kill -0: $(kill -0 "$ended" && echo alive)"
	echo "its other thread: $(look "$ended/task/$other")"
	echo "zombie: $(look "$zombie")"
} >seen
expect <<'SEEN'
running: v1 /finding, v2 /finding
main thread has ended: v1 /, v2 /finding; kill -0: alive
its other thread: v1 /finding, v2 /finding
zombie: v1 /, v2 /finding
SEEN
