package server_test

import (
	"fmt"
	"net"
	"sync/atomic"
	"testing"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"golang.org/x/sync/errgroup"
)

// BenchmarkRenewAgent measures the agent renewals a second of a server with a store, by
// one caller and by many.
func BenchmarkRenewAgent(b *testing.B) {
	c := newConfig(b, "default")
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	check(b, err)
	c.Deployments[0].Listener = unlimited(lis)
	a := run(b, c).join("default")
	_, csr := newKey(b)
	for _, callers := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("by %d", callers), func(b *testing.B) {
			var next atomic.Int64
			var group errgroup.Group
			b.ResetTimer()
			for range callers {
				group.Go(func() error {
					for next.Add(1) <= int64(b.N) {
						_, err := a.RenewAgent(b.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr}})
						if err != nil {
							return err
						}
					}
					return nil
				})
			}
			check(b, group.Wait())
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "renewals/s")
		})
	}
}
