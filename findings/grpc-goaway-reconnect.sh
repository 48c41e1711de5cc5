#!/usr/bin/env bash
# A gRPC client reconnects at once after GOAWAY, but backs off if the server closes the connection.
#
# Seen with   grpc-go v1.85.0
# Behaviour   If a connection is closed before the server's first frame, the client backs off: three
#             attempts in three seconds. If the server refuses with SETTINGS and GOAWAY (RFC 9113,
#             section 6.8) and ENHANCE_YOUR_CALM, the connection counts as established and then
#             drained. There is no backoff: one waiting call makes more than a hundred connections
#             in those three seconds, each with a new handshake.
# Operators   A proxy or server that sheds connections by GOAWAY gets more of them. Let it close the
#             connections.
# renewd      closes a connection above a limit without GOAWAY, and reports it in the server's log
#             and in renewd_server_limited_total (internal/listen).
#
# Output seen
#   closed: a few connections
#   told to go away: more than twenty
source "$(dirname "$0")/lib.sh"
go_module google.golang.org/grpc@v1.85.0
go get google.golang.org/grpc/health@v1.85.0 golang.org/x/net/http2 2>/dev/null
cat >main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// connections counts those that one call makes in three seconds.
func connections(serve func(net.Conn)) int64 {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer lis.Close()
	var n atomic.Int64
	go func() {
		for {
			c, err := lis.Accept()
			if err != nil {
				return
			}
			n.Add(1)
			go serve(c)
		}
	}()
	client, err := grpc.NewClient(lis.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	_, err = grpc_health_v1.NewHealthClient(client).Check(ctx, &grpc_health_v1.HealthCheckRequest{}, grpc.WaitForReady(true))
	fmt.Fprintln(os.Stderr, n.Load(), "connections:", err)
	return n.Load()
}

func main() {
	closed := connections(func(c net.Conn) { c.Close() })
	away := connections(func(c net.Conn) {
		defer c.Close()
		framer := http2.NewFramer(c, c)
		framer.WriteSettings()
		framer.WriteGoAway(0, http2.ErrCodeEnhanceYourCalm, []byte("too many connections"))
		c.SetReadDeadline(time.Now().Add(time.Second))
		io.Copy(io.Discard, c)
	})
	few := map[bool]string{true: "a few connections", false: "more than twenty"}
	fmt.Println("closed:", few[closed <= 20])
	fmt.Println("told to go away:", few[away <= 20])
}
GO
go mod tidy 2>/dev/null
go run . >seen
expect <<'SEEN'
closed: a few connections
told to go away: more than twenty
SEEN
