package main

import (
	"context"
	"net"
	"sync"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/stats"
)

// pace notes at the server when each renewal arrives: what the agent costs it.
type pace struct {
	mu       sync.Mutex
	renewals []renewal
	accepted map[string]time.Time // connections that are being set up, by remote address
	setups   []setup
}

type renewal struct {
	at  time.Time
	own bool // of the agent's own SVID
}

// setup is a connection that took some time to set up. A call that was to be
// the first on it reached the server that much later than it was begun.
type setup struct {
	at   time.Time
	took time.Duration
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

// listen has the connections of a listener noted.
func (p *pace) listen(lis net.Listener) net.Listener { return pacedListener{lis, p} }

type pacedListener struct {
	net.Listener
	pace *pace
}

func (l pacedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil {
		l.pace.mu.Lock()
		defer l.pace.mu.Unlock()
		if l.pace.accepted == nil {
			l.pace.accepted = make(map[string]time.Time)
		}
		l.pace.accepted[conn.RemoteAddr().String()] = time.Now()
	}
	return conn, err
}

// TagConn implements stats.Handler: it is called when a connection is ready
// for calls.
func (p *pace) TagConn(ctx context.Context, info *stats.ConnTagInfo) context.Context {
	p.mu.Lock()
	defer p.mu.Unlock()
	address := info.RemoteAddr.String()
	if at, ok := p.accepted[address]; ok {
		delete(p.accepted, address)
		p.setups = append(p.setups, setup{at: time.Now(), took: time.Since(at)})
	}
	return ctx
}

// TagRPC implements stats.Handler.
func (*pace) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }

// HandleRPC implements stats.Handler.
func (*pace) HandleRPC(context.Context, stats.RPCStats) {}

// HandleConn implements stats.Handler.
func (*pace) HandleConn(context.Context, stats.ConnStats) {}

// slowestSetup is the longest that a connection took from t on.
func (p *pace) slowestSetup(t time.Time) (longest time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.setups {
		if !s.at.Before(t) {
			longest = max(longest, s.took)
		}
	}
	return longest
}

// lateness measures until ctx ends by how much this machine delays a goroutine
// that wants to run at a given moment. What the agent started in time reaches
// the server late by about as much at most.
func lateness(ctx context.Context) time.Duration {
	const every = 10 * time.Millisecond
	var worst time.Duration
	timer := time.NewTimer(every)
	defer timer.Stop()
	for due := time.Now().Add(every); ; due = time.Now().Add(every) {
		select {
		case <-ctx.Done():
			return worst
		case <-timer.C:
		}
		worst = max(worst, time.Since(due))
		timer.Reset(every)
	}
}
