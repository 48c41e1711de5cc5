package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
)

const (
	callInterval = 25 * time.Millisecond // per workload
	callTimeout  = 10 * time.Second
)

// serveCalls serves calls. A call is a new mutual TLS connection with the current SVID and
// trust bundle, on which one byte is echoed.
func (w *workload) serveCalls(ctx context.Context) (address string, err error) {
	svid, err := w.source.GetX509SVID()
	if err != nil {
		return "", err
	}
	lis, err := tls.Listen("tcp", "127.0.0.1:0",
		tlsconfig.MTLSServerConfig(w.source, w.source, tlsconfig.AuthorizeMemberOf(svid.ID.TrustDomain())))
	if err != nil {
		return "", fmt.Errorf("listen for calls: %w", err)
	}
	context.AfterFunc(ctx, func() { lis.Close() })
	w.wg.Go(func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			w.wg.Go(func() {
				defer conn.Close()
				_ = conn.SetDeadline(time.Now().Add(callTimeout))
				_, _ = io.CopyN(conn, conn, 1) // the caller counts failures
			})
		}
	})
	return lis.Addr().String(), nil
}

// callAll calls the others in turn until ctx ends.
func (w *workload) callAll(ctx context.Context, peers []remote) {
	defer w.update(func(c *workloadState) { c.Stopped = true })
	ticker := time.NewTicker(callInterval)
	defer ticker.Stop()
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		p := peers[i%len(peers)]
		err := w.call(p)
		w.mu.Lock()
		w.state.Calls++
		if err != nil {
			w.state.Failures++
			w.state.failed(fmt.Errorf("call %s: %w", p.ID, err))
		}
		w.mu.Unlock()
	}
}

// call ignores the end of the demo, because an interrupted call would count as failed.
func (w *workload) call(p remote) error {
	id, err := spiffeid.FromString(p.ID)
	if err != nil {
		return err
	}
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: callTimeout}, "tcp", p.Address,
		tlsconfig.MTLSClientConfig(w.source, w.source, tlsconfig.AuthorizeID(id)))
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(callTimeout))
	if _, err := conn.Write([]byte{1}); err != nil {
		return err
	}
	// With TLS 1.3 only an answer shows that the peer accepted our certificate.
	_, err = io.ReadFull(conn, make([]byte, 1))
	return err
}
