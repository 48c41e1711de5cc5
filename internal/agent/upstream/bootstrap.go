package upstream

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/renewd/renewd/bundle"
)

// Bootstrap returns the first bundle from the server. It verifies the server with
// [Config.Bundle] or, when that is nil and [Config.Insecure] is set, not at all. It
// tries until it succeeds or ctx is done. It fails at once when there is neither.
func (c *Client) Bootstrap(ctx context.Context) (*bundle.Bundle, error) {
	if c.cfg.Bundle() == nil && !c.cfg.Insecure {
		return nil, errors.New("there is no trust bundle: set trust_bundle_file or trust_bundle_url, or insecure_bootstrap to trust the first server that answers")
	}
	if c.cfg.Bundle() == nil {
		c.cfg.Log.Warn("insecure bootstrap started, the first server that answers is trusted", "address", c.cfg.ServerAddress)
	}
	pace, failures := newPace(), c.failures()
	for {
		b, err := c.bootstrap(ctx)
		if err == nil {
			return b, nil
		}
		if ctx.Err() != nil || errors.Is(err, ErrBanned) || errors.Is(err, errClosed) {
			return nil, err
		}
		failures.Note(slog.LevelWarn, "bootstrap failed, trying again", withoutNumbers(err), "error", err)
		if sleep(ctx, pace.NextBackOff()) != nil {
			return nil, err
		}
	}
}

func (c *Client) bootstrap(ctx context.Context) (*bundle.Bundle, error) {
	if c.cfg.Bundle() != nil {
		return c.FetchBundle(ctx)
	}
	l, err := c.open(nil, c.insecureTLS())
	if err != nil {
		return nil, err
	}
	defer l.conn.Close()
	ctx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	var p peer.Peer
	b, err := c.getBundle(ctx, l.conn, grpc.Peer(&p))
	if err != nil {
		return nil, fmt.Errorf("bootstrap insecurely: %w", err)
	}
	// This does not authenticate the server. But with a bundle that does not fit
	// its own server every later call would fail.
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return nil, errors.New("bootstrap insecurely: the connection has no TLS")
	}
	if err := verifyServer(info.State.PeerCertificates, c.cfg.TrustDomain, b, c.cfg.Now()); err != nil {
		return nil, fmt.Errorf("bootstrap insecurely: %w", err)
	}
	return b, nil
}

// getBundle fetches the bundle of the trust domain over any connection.
func (c *Client) getBundle(ctx context.Context, conn grpc.ClientConnInterface, opts ...grpc.CallOption) (*bundle.Bundle, error) {
	opts = append(opts, grpc.MaxCallRecvMsgSize(maxBundleBytes))
	answer, err := bundlev1.NewBundleClient(conn).GetBundle(ctx, &bundlev1.GetBundleRequest{}, opts...)
	if err != nil {
		return nil, err
	}
	return parseBundle(c.cfg.TrustDomain, answer)
}
