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
	callEvery   = 25 * time.Millisecond // from each workload
	callTimeout = 10 * time.Second
)

// answer takes calls: each is a connection with mutual TLS of its own, with
// the SVID and the trust bundle held at that moment, and one byte back and
// forth.
func (w *workload) answer(ctx context.Context) (address string, err error) {
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
				_, _ = io.CopyN(conn, conn, 1) // the caller counts what fails
			})
		}
	})
	return lis.Addr().String(), nil
}

// callAll calls the others in turn until ctx ends.
func (w *workload) callAll(ctx context.Context, peers []remote) {
	defer w.change(func(c *condition) { c.Stopped = true })
	ticker := time.NewTicker(callEvery)
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
		w.now.Calls++
		if err != nil {
			w.now.Failures++
			w.now.failed(fmt.Errorf("call %s: %w", p.ID, err))
		}
		w.mu.Unlock()
	}
}

// call is not cut short when the demo ends: that would be counted as a failure
// at the other side.
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
	// With TLS 1.3 only an answer shows that the other side accepted us.
	_, err = io.ReadFull(conn, make([]byte, 1))
	return err
}
