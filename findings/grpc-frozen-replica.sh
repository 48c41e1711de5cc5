#!/usr/bin/env bash
# One connection to a frozen server blocks a gRPC-Go client for 20 seconds, whatever its deadlines.
#
# Seen with   gRPC-Go v1.85.0
# Behaviour   The kernel accepts connections for a process that is stopped or swapped out. gRPC-Go
#             waits 20 s for such a connection to become usable (the default of
#             MinConnectTimeout). Meanwhile calls with a deadline of 3 s fail one after the
#             other. Their deadlines do not end the attempt, so the client does not reach the
#             healthy replica that a balancer would choose next.
# Operators   If one of several servers behind a TCP balancer hangs and passes the balancer's TCP
#             check, it blocks each client that connects to it for 20 s.
# renewd      limits a connection attempt to 5 s, TLS included (connectTimeout in
#             internal/agent/upstream; TestTwoServersOnOneDatabase freezes a server behind a balancer).
#
# Output seen
#   call 1: DeadlineExceeded after 3 s
#   call 2: DeadlineExceeded after 6 s
#   call 3: DeadlineExceeded after 9 s
#   call 4: DeadlineExceeded after 12 s
#   call 5: DeadlineExceeded after 15 s
#   call 6: DeadlineExceeded after 18 s
#   call 7: Unavailable after 20 s
source "$(dirname "$0")/lib.sh"
go_module google.golang.org/grpc@v1.85.0
cat >main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func main() {
	lis := must(net.Listen("tcp", "127.0.0.1:0"))
	srv := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(srv, health.NewServer())
	go srv.Serve(lis)

	// The balancer passes the first connection to a frozen server: the kernel accepts
	// it, but the server does not answer. Later ones reach the server above.
	balancer := must(net.Listen("tcp", "127.0.0.1:0"))
	go func() {
		for n := 0; ; n++ {
			in, err := balancer.Accept()
			if err != nil {
				return
			}
			if n == 0 {
				continue
			}
			out := must(net.Dial("tcp", lis.Addr().String()))
			go io.Copy(out, in)
			go io.Copy(in, out)
		}
	}()

	conn := must(grpc.NewClient(balancer.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials())))
	client := grpc_health_v1.NewHealthClient(conn)
	start := time.Now()
	for call := 1; call <= 7; call++ {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		_, err := client.Check(ctx, &grpc_health_v1.HealthCheckRequest{})
		cancel()
		fmt.Printf("call %d: %v after %.0f s\n", call, status.Code(err), time.Since(start).Seconds())
	}
}
GO
go run . >seen
expect <<'SEEN'
call 1: DeadlineExceeded after 3 s
call 2: DeadlineExceeded after 6 s
call 3: DeadlineExceeded after 9 s
call 4: DeadlineExceeded after 12 s
call 5: DeadlineExceeded after 15 s
call 6: DeadlineExceeded after 18 s
call 7: Unavailable after 20 s
SEEN
