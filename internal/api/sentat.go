package api

import (
	"context"
	"net"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
)

// sentAtKey is the metadata key of the time of the caller's clock.
const sentAtKey = "renewd-sent-at"

// WithSentAt adds the time of the caller's clock to the metadata of an outgoing call.
func WithSentAt(ctx context.Context, t time.Time) context.Context {
	return metadata.AppendToOutgoingContext(ctx, sentAtKey, t.UTC().Format(time.RFC3339Nano))
}

// SentAt returns the time that the caller's clock showed when it made the call. ok is
// false if that is not another clock's time: the caller did not send it, or is on this
// machine. The containers on a machine share its clock, but those with their own
// addresses cannot be recognized as being on this machine.
func SentAt(ctx context.Context) (t time.Time, ok bool) {
	sent := metadata.ValueFromIncomingContext(ctx, sentAtKey)
	p, known := peer.FromContext(ctx)
	if len(sent) != 1 || !known || sameMachine(p.Addr, p.LocalAddr) {
		return time.Time{}, false
	}
	t, err := time.Parse(time.RFC3339Nano, sent[0])
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
