#!/usr/bin/env bash
# A stock client reconnects up to two and a half minutes after its agent is back.
#
# Seen with   go-spiffe v2.9.0, gRPC-Go v1.85.0
# Behaviour   While nothing listens on the socket, gRPC-Go waits 1 s, then 1.6 times as long
#             after each failure, up to 120 s +-20 %. go-spiffe adds its own pause of up to
#             30 s. Neither pause ends when the socket is back. After 52 s without an agent
#             the client here stays disconnected for another half a minute.
# Operators   A running agent does not mean that the workloads have their streams: after an outage
#             of T seconds allow for 0.6 T, at most 150 s, before SVIDs that were renewed in
#             between reach the workloads. Keep outages of an agent short.
# renewd      keeps SVIDs over a restart (internal/agent/svidstore), so that late clients get them, and
#             reports a node as settled only after they had time to reconnect.
#
# Output seen (the second line varies)
#   more than 5 s after the agent
#   26 s
source "$(dirname "$0")/lib.sh"
go_module github.com/spiffe/go-spiffe/v2@v2.9.0 google.golang.org/grpc@v1.85.0
cat >main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// api says when it was asked; what it answers does not matter here.
type api struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	asked chan struct{}
}

func (a *api) FetchX509SVID(_ *workload.X509SVIDRequest, s workload.SpiffeWorkloadAPI_FetchX509SVIDServer) error {
	a.asked <- struct{}{}
	<-s.Context().Done()
	return s.Context().Err()
}

func serve() (*api, *grpc.Server) {
	lis := must(net.Listen("unix", "agent.sock"))
	a := &api{asked: make(chan struct{}, 1)}
	srv := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(srv, a)
	go srv.Serve(lis)
	return a, srv
}

func main() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	a, srv := serve()
	go workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+must(os.Getwd())+"/agent.sock")))
	<-a.asked
	srv.Stop()
	time.Sleep(52 * time.Second)
	a, srv = serve()
	defer srv.Stop()
	back := time.Now()
	<-a.asked
	late := time.Since(back)
	fmt.Fprintf(os.Stderr, "%.0f s\n", late.Seconds())
	if late > 5*time.Second {
		fmt.Println("more than 5 s after the agent")
	} else {
		fmt.Println("within 5 s")
	}
}
GO
go run . >seen
expect <<'SEEN'
more than 5 s after the agent
SEEN
