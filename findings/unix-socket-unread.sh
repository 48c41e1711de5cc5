#!/usr/bin/env bash
# On a Unix socket SIOCOUTQ does not count the bytes that the peer has not read.
#
# Seen with   Linux 6, golang.org/x/sys v0.49.0
# Behaviour   The kernel returns the memory of the messages that are not read completely, including its
#             bookkeeping: hundreds of bytes for one byte, and the same for the last byte of a message
#             as for all of it. The value is 0 only if everything was read. For TCP the same call
#             counts bytes that are not acknowledged, which does not show what the reader has read.
# Operators   The Send-Q column of `ss -x` is this number: it shows that a workload does not read, not
#             how much is left.
# renewd      only tests for 0 (internal/agent/workload): then an answer counts as read.
#
# Output seen
#   1 byte written: more than 1
#   1000 bytes written: more than 1000
#   999 of them read: the same as before
#   all read: 0
source "$(dirname "$0")/lib.sh"
go_module golang.org/x/sys@v0.49.0
cat >main.go <<'GO'
package main

import (
	"fmt"
	"log"

	"golang.org/x/sys/unix"
)

func main() {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	check(err)
	write := func(n int) {
		_, err := unix.Write(fds[0], make([]byte, n))
		check(err)
	}
	read := func(n int) {
		_, err := unix.Read(fds[1], make([]byte, n))
		check(err)
	}
	unread := func() int {
		n, err := unix.IoctlGetInt(fds[0], unix.SIOCOUTQ)
		check(err)
		return n
	}
	more := func(than int) any {
		if n := unread(); n <= than {
			return n
		}
		return fmt.Sprint("more than ", than)
	}
	write(1)
	fmt.Println("1 byte written:", more(1))
	read(1)
	write(1000)
	fmt.Println("1000 bytes written:", more(1000))
	before := unread()
	read(999)
	if unread() == before {
		fmt.Println("999 of them read: the same as before")
	} else {
		fmt.Println("999 of them read:", unread())
	}
	read(1)
	fmt.Println("all read:", unread())
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
GO
go run . >seen
expect <<'SEEN'
1 byte written: more than 1
1000 bytes written: more than 1000
999 of them read: the same as before
all read: 0
SEEN
