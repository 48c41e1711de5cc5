#!/usr/bin/env bash
# /proc/PID/exe does not exist for a process that continues after its main thread ended.
#
# Seen with   Linux 6.18
# Behaviour   If the main thread ends while others run (a daemon that calls pthread_exit in main),
#             /proc/PID/exe fails with ENOENT as long as the process lives, and
#             /proc/PID/status calls it a zombie. /proc/PID/task/TID/exe of a running thread
#             exists.
# Operators   Attestation by path or hash (unix:path, unix:sha256 of SPIRE) reads /proc/PID/exe. It
#             cannot distinguish such a daemon from an ended process: the daemon loses these
#             selectors.
# renewd      reads the executable of a live thread (internal/agent/attest/unix).
#
# Output seen
#   state: Z (zombie)
#   kill -0: alive
#   exe of the process: No such file or directory
#   exe of its other thread: leader
source "$(dirname "$0")/lib.sh"
need cc gcc
cat >leader.c <<'C'
#include <pthread.h>
#include <unistd.h>

static void *work(void *arg) {
	pause();
	return arg;
}

int main(void) {
	pthread_t t;
	if (pthread_create(&t, 0, work, 0))
		return 1;
	pthread_exit(0);
}
C
cc -pthread -o leader leader.c
background leader.log ./leader
pid=$(cat pids)
ended() { grep -q '^State:.*Z' "/proc/$pid/status"; }
until_true 10 ended
tid=$(ls "/proc/$pid/task" | grep -vx "$pid")
look() {
	local target
	if target=$(readlink "$1"); then echo "${target##*/}"; else ls -l "$1" 2>&1 | grep -o 'No such file or directory' | head -n 1; fi
}
{
	echo "state: $(sed -n 's/^State:\s*//p' "/proc/$pid/status")"
	echo "kill -0: $(kill -0 "$pid" && echo alive)"
	echo "exe of the process: $(look "/proc/$pid/exe")"
	echo "exe of its other thread: $(look "/proc/$pid/task/$tid/exe")"
} >seen
expect <<'SEEN'
state: Z (zombie)
kill -0: alive
exe of the process: No such file or directory
exe of its other thread: leader
SEEN
