#!/usr/bin/env bash
# On a Unix socket SIOCOUTQ does not count the bytes that the peer has not read.
#
# Seen with   Linux 6, golang.org/x/sys v0.49.0
# Behaviour   The kernel answers with the memory of the messages that are not read to their end, with its
#             own bookkeeping: hundreds of bytes for one byte, and as much for a message of which a
#             single byte is left as for the whole. It is 0 when everything was read, and only then.
#             For TCP the same call counts bytes that are not acknowledged, which says nothing of the reader.
# Operators   The Send-Q column of `ss -x` is this number: it tells that a workload does not read, not how much.
# renewd      only asks whether it is 0 (internal/agent/workload): that is when an answer counts as read.
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
