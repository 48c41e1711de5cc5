package main

import (
	"context"
	"sync"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"
)

// renewalRecorder records at the server when renewals arrive.
type renewalRecorder struct {
	mu       sync.Mutex
	renewals []renewal
}

type renewal struct {
	at  time.Time
	own bool // of the agent SVID
}

// intercept is a grpc.UnaryServerInterceptor.
func (r *renewalRecorder) intercept(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	n, own := 0, false
	switch req := req.(type) {
	case *svidv1.BatchNewX509SVIDRequest:
		n = len(req.GetParams())
	case *agentv1.RenewAgentRequest:
		n, own = 1, true
	}
	r.mu.Lock()
	now := time.Now()
	for range n {
		r.renewals = append(r.renewals, renewal{at: now, own: own})
	}
	r.mu.Unlock()
	return handler(ctx, req)
}

// since returns the renewals that arrived at t or later, in order.
func (r *renewalRecorder) since(t time.Time) []renewal {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, n := range r.renewals {
		if !n.at.Before(t) {
			return append([]renewal(nil), r.renewals[i:]...)
		}
	}
	return nil
}

// peakPerSecond returns the largest number of renewals in any one second.
func peakPerSecond(renewals []renewal) int {
	n, from := 0, 0
	for i, r := range renewals {
		for r.at.Sub(renewals[from].at) >= time.Second {
			from++
		}
		n = max(n, i-from+1)
	}
	return n
}
