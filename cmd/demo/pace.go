package main

import (
	"context"
	"sync"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"
)

// pace notes at the server when each renewal arrives: what the agent costs it.
type pace struct {
	mu       sync.Mutex
	renewals []renewal
}

type renewal struct {
	at  time.Time
	own bool // of the agent's own SVID
}

// intercept is a grpc.UnaryServerInterceptor.
func (p *pace) intercept(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	n, own := 0, false
	switch r := req.(type) {
	case *svidv1.BatchNewX509SVIDRequest:
		n = len(r.GetParams())
	case *agentv1.RenewAgentRequest:
		n, own = 1, true
	}
	p.mu.Lock()
	now := time.Now()
	for range n {
		p.renewals = append(p.renewals, renewal{at: now, own: own})
	}
	p.mu.Unlock()
	return handler(ctx, req)
}

// since returns the renewals that arrived at t or later, in order.
func (p *pace) since(t time.Time) []renewal {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, r := range p.renewals {
		if !r.at.Before(t) {
			return append([]renewal(nil), p.renewals[i:]...)
		}
	}
	return nil
}

// most is the largest number of renewals in any one second.
func most(renewals []renewal) int {
	n, from := 0, 0
	for i, r := range renewals {
		for r.at.Sub(renewals[from].at) >= time.Second {
			from++
		}
		n = max(n, i-from+1)
	}
	return n
}
