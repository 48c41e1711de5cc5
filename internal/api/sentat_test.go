package api_test

import (
	"context"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/renewd/renewd/internal/api"
)

// TestSentAt: the time that a caller sends counts only if it is from another machine.
func TestSentAt(t *testing.T) {
	t.Parallel()
	sent := time.Date(2026, 1, 2, 3, 4, 5, 6, time.FixedZone("", 3600))
	tcp := func(ip string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: 1} }
	for name, c := range map[string]struct {
		remote, local net.Addr
		change        func(metadata.MD)
		ok            bool
	}{
		"another machine": {remote: tcp("192.0.2.1"), local: tcp("192.0.2.2"), ok: true},
		"this machine":    {remote: tcp("192.0.2.1"), local: tcp("::ffff:192.0.2.1")},
		"loopback":        {remote: tcp("::1"), local: tcp("::1")},
		"admin socket":    {remote: &net.UnixAddr{Name: "@"}, local: &net.UnixAddr{Name: "/run/x"}},
		"nothing said":    {remote: tcp("192.0.2.1"), local: tcp("192.0.2.2"), change: func(m metadata.MD) { m.Delete("renewd-sent-at") }},
		"said twice":      {remote: tcp("192.0.2.1"), local: tcp("192.0.2.2"), change: func(m metadata.MD) { m.Append("renewd-sent-at", "x") }},
		"no time":         {remote: tcp("192.0.2.1"), local: tcp("192.0.2.2"), change: func(m metadata.MD) { m.Set("renewd-sent-at", "noon") }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			said, _ := metadata.FromOutgoingContext(api.WithSentAt(t.Context(), sent))
			if c.change != nil {
				c.change(said)
			}
			ctx := metadata.NewIncomingContext(context.Background(), said)
			ctx = peer.NewContext(ctx, &peer.Peer{Addr: c.remote, LocalAddr: c.local})
			got, ok := api.SentAt(ctx)
			if ok != c.ok || ok && !got.Equal(sent) {
				t.Errorf("got %v %v, want %v %v", got, ok, sent, c.ok)
			}
		})
	}
}
