package api

import (
	"context"
	"net"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
)

// sentAtKey is the metadata in which a caller says what its own clock shows.
const sentAtKey = "renewd-sent-at"

// WithSentAt adds to an outgoing call what the caller's clock shows.
func WithSentAt(ctx context.Context, t time.Time) context.Context {
	return metadata.AppendToOutgoingContext(ctx, sentAtKey, t.UTC().Format(time.RFC3339Nano))
}

// SentAt returns what the clock of a caller showed when it made the call. ok is
// false where that says nothing of another clock: the caller does not say it, or is on
// this machine. A machine has one clock, also for the containers on it; of those that
// have addresses of their own it cannot be seen that they are on this machine.
func SentAt(ctx context.Context) (t time.Time, ok bool) {
	said := metadata.ValueFromIncomingContext(ctx, sentAtKey)
	p, known := peer.FromContext(ctx)
	if len(said) != 1 || !known || sameMachine(p.Addr, p.LocalAddr) {
		return time.Time{}, false
	}
	t, err := time.Parse(time.RFC3339Nano, said[0])
	return t, err == nil
}

// sameMachine reports whether both ends of a connection may be on one machine.
func sameMachine(remote, local net.Addr) bool {
	r, ok := remote.(*net.TCPAddr)
	if !ok {
		return true
	}
	l, ok := local.(*net.TCPAddr)
	return r.IP.IsLoopback() || ok && l.IP.Equal(r.IP)
}
