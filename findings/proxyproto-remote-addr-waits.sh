#!/usr/bin/env bash
# Asking go-proxyproto for the address of a connection waits for its client.
#
# Seen with   github.com/pires/go-proxyproto v0.15.0
# Behaviour   RemoteAddr and LocalAddr read the PROXY protocol header. They return when it has come,
#             or after ReadHeaderTimeout, 10 s by default. Accept does not wait. So a server that
#             logs the address of a connection before it accepts the next one has every client
#             wait for the slowest. RemoteAddr of Go's own connections returns at once.
# Operators   If new connections through a balancer come in bursts, seconds apart, look for a slow
#             balancer, and lower the timeout.
# renewd      parses headers with the library but does not use its listener: the header is read with
#             the first bytes of the connection, and until then its address is the
#             balancer's (internal/listen, TestSlowProxyDelaysNobody).
#
# Output seen
#   first client sends its header after 3 s
#     0 s: connection accepted
#     3 s: it is from 192.0.2.1:1000
#     3 s: connection accepted
#     3 s: it is from 192.0.2.2:1000
source "$(dirname "$0")/lib.sh"
go_module github.com/pires/go-proxyproto@v0.15.0
cat >main.go <<'GO'
package main

import (
	"fmt"
	"net"
	"time"

	"github.com/pires/go-proxyproto"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// serve accepts two connections and says where they are from. The second client sends its
// header at once, the first after the given time.
func serve(delay time.Duration) {
	lis := &proxyproto.Listener{Listener: must(net.Listen("tcp", "127.0.0.1:0"))}
	defer lis.Close()
	slow := must(net.Dial("tcp", lis.Addr().String()))
	defer slow.Close()
	fast := must(net.Dial("tcp", lis.Addr().String()))
	defer fast.Close()
	must(fmt.Fprint(fast, "PROXY TCP4 192.0.2.2 192.0.2.9 1000 443\r\n"))
	time.AfterFunc(delay, func() { must(fmt.Fprint(slow, "PROXY TCP4 192.0.2.1 192.0.2.9 1000 443\r\n")) })
	start := time.Now()
	for range 2 {
		c := must(lis.Accept())
		fmt.Printf("  %.0f s: connection accepted\n", time.Since(start).Seconds())
		address := c.RemoteAddr()
		fmt.Printf("  %.0f s: it is from %s\n", time.Since(start).Seconds(), address)
		c.Close()
	}
}

func main() {
	fmt.Println("first client sends its header after 3 s")
	serve(3*time.Second)
}
GO
go run . >seen
expect <<'SEEN'
first client sends its header after 3 s
  0 s: connection accepted
  3 s: it is from 192.0.2.1:1000
  3 s: connection accepted
  3 s: it is from 192.0.2.2:1000
SEEN
