package upstream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/agent/node"
)

// calmness is how long an identity must have been good for before the next
// proof may begin without a pause. Two machines that share one identity evict
// each other with every proof; this keeps them from doing it in a tight loop.
const calmness = time.Minute

// newPace makes the pauses between tries to prove the node or to bootstrap.
// RandomizationFactor 1 makes each pause uniform between zero and twice the
// interval: full jitter, so that a fleet that lost its server does not come
// back in step. MaxInterval is the mean of the longest pauses, which hence are
// at most 5 s: a server that is back is found soon, and as it lets one
// attestation a second through for each address, asking more rarely would not
// relieve it.
func newPace() *backoff.ExponentialBackOff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval = 500 * time.Millisecond
	b.RandomizationFactor = 1
	b.Multiplier = 1.5
	b.MaxInterval = 2500 * time.Millisecond
	b.Reset()
	return b
}

// sleep waits, or returns the error of ctx when that ends first.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// proof is a row of tries in the background to prove the node.
type proof struct{ done chan struct{} }

// refusal is an identity that the server does not accept, and what it said.
type refusal struct {
	identity *node.Identity
	err      error
}

// verdict remembers whether an identity has lost its authority, because to find
// out costs a signature check.
type verdict struct {
	identity       *node.Identity
	force, fetched *bundle.Bundle
	err            error
}

// usable returns the identity to make calls with or, with a nil identity, why
// there is none. An SVID that has expired, or whose authority was removed, is
// not presented: the server would end the handshake, and then not even the
// bundle could be asked for. Whether it has expired is for the server's clock to
// say: one that is outside its life by this node's clock is presented once the
// server has vouched for it.
func (c *Client) usable() (*node.Identity, error) {
	id := c.cfg.Node.Identity()
	if id == nil {
		return nil, errors.New("there is no agent SVID yet")
	}
	if err := id.ValidAt(c.cfg.Now()); err != nil && (c.vouched.Load() != id || id.Ended()) {
		return nil, err
	}
	force, fetched := c.cfg.Bundle(), c.fetched.Load()
	v := c.judged.Load()
	if v == nil || v.identity != id || v.force != force || v.fetched != fetched {
		v = &verdict{id, force, fetched, orphaned(id, force, fetched)}
		c.judged.Store(v)
	}
	if v.err != nil {
		return nil, v.err
	}
	return id, nil
}

// orphaned returns an error when no authority stands behind the identity. Both
// the bundle in force and the last one fetched have to say so: the one may be
// the bundle of the bootstrap, from before the identity was signed, and the
// other may come from a server that lags behind.
func orphaned(id *node.Identity, force, fetched *bundle.Bundle) error {
	if force == nil || fetched == nil {
		return nil
	}
	leaf := id.Chain[0]
	at := leaf.NotBefore // expiry is judged elsewhere
	if _, err := force.Verify(leaf, id.Chain[1:], at); err == nil {
		return nil
	}
	_, err := fetched.Verify(leaf, id.Chain[1:], at)
	var unknown x509.UnknownAuthorityError
	if !errors.As(err, &unknown) {
		return nil
	}
	return fmt.Errorf("the authority of the agent SVID was removed: %w", err)
}

// Bootstrap returns the server's bundle when there is no trust yet: from a
// server verified with the bundle in force, or, when that is nil and
// [Config.Insecure] says so, from whoever answers. It tries until it succeeds
// or ctx is done; only a configuration without any source of trust is an error
// at once.
func (c *Client) Bootstrap(ctx context.Context) (*bundle.Bundle, error) {
	if c.cfg.Bundle() == nil && !c.cfg.Insecure {
		return nil, errors.New("there is no trust bundle: set trust_bundle_file, or insecure_bootstrap to take it from the first server that answers")
	}
	if c.cfg.Bundle() == nil {
		c.cfg.Log.Warn("bootstrapping insecurely: the first server that answers is trusted", "server", c.cfg.ServerAddress)
	}
	pace, log := newPace(), c.grumbler("bootstrap")
	for {
		b, err := c.bootstrap(ctx)
		if err == nil {
			return b, nil
		}
		if ctx.Err() != nil || errors.Is(err, ErrBanned) || errors.Is(err, errClosed) {
			return nil, err
		}
		log(err)
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
	ctx, cancel := context.WithTimeout(ctx, c.cfg.PollTimeout)
	defer cancel()
	var p peer.Peer
	b, err := c.getBundle(ctx, l.conn, grpc.Peer(&p))
	if err != nil {
		return nil, fmt.Errorf("bootstrap insecurely: %w", err)
	}
	// This is no proof, but a bundle that does not even cover the server it
	// came from could only lead to failures later on.
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return nil, errors.New("bootstrap insecurely: the connection has no TLS")
	}
	if err := verifyServer(info.State.PeerCertificates, c.cfg.TrustDomain, b, c.cfg.Now()); err != nil {
		return nil, fmt.Errorf("bootstrap insecurely: %w", err)
	}
	return b, nil
}

// getBundle asks for the own bundle over any connection.
func (c *Client) getBundle(ctx context.Context, conn grpc.ClientConnInterface, opts ...grpc.CallOption) (*bundle.Bundle, error) {
	opts = append(opts, grpc.MaxCallRecvMsgSize(maxBundleBytes))
	answer, err := bundlev1.NewBundleClient(conn).GetBundle(ctx, &bundlev1.GetBundleRequest{}, opts...)
	if err != nil {
		return nil, err
	}
	return parseBundle(c.cfg.TrustDomain, answer)
}

// Attest returns when the node has an identity, at once when it has one
// already. Otherwise the node is attested, with growing random pauses between
// tries, until that succeeds or ctx is done. It fails for good with
// [ErrBanned], and with [node.ErrNoProof] when there is no identity and nothing
// is configured to attest with.
func (c *Client) Attest(ctx context.Context) error {
	for {
		if c.banned.Load() {
			return ErrBanned
		}
		if _, err := c.usable(); err == nil {
			return nil
		}
		// An identity that has expired may have done so by a wrong clock only.
		if err := c.cfg.Node.Provable(ctx); errors.Is(err, node.ErrNoProof) && c.cfg.Node.Identity() == nil {
			return err
		}
		p := c.prove()
		if p == nil {
			return errClosed
		}
		select {
		case <-p.done:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Identified is nil when there is an identity that calls can be made with, and
// otherwise says why not.
func (c *Client) Identified() error {
	id, err := c.usable()
	if c.banned.Load() {
		return ErrBanned
	}
	if r := c.refused.Load(); err == nil && r != nil && r.identity == id {
		return r.err
	}
	return err
}

// Attested is when this Client last proved the node, by the clock that is never
// set; zero when it did not, because the identity was kept from the last run.
func (c *Client) Attested() time.Time {
	if at := c.attested.Load(); at != nil {
		return *at
	}
	return time.Time{}
}

// prove makes sure that the node is being proved in the background. It returns
// nil when the Client is closed.
func (c *Client) prove() *proof {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil
	}
	if c.proof == nil {
		p := &proof{done: make(chan struct{})}
		c.proof = p
		c.work.Go(func() {
			c.keepProving()
			c.mu.Lock()
			c.proof = nil
			c.mu.Unlock()
			close(p.done)
		})
	}
	return c.proof
}

// keepProving tries until the node is proved, banned, or the Client closed.
func (c *Client) keepProving() {
	log := c.grumbler("proof of the node")
	if at := c.Attested(); at.IsZero() || time.Since(at) >= calmness {
		c.pace.Reset()
	} else if sleep(c.ctx, c.pace.NextBackOff()) != nil {
		return
	}
	for c.Identified() != nil && !c.banned.Load() {
		err := c.attest(c.ctx)
		if err == nil || c.ctx.Err() != nil || c.banned.Load() {
			return
		}
		log(err)
		if sleep(c.ctx, c.pace.NextBackOff()) != nil {
			return
		}
	}
}

// grumbler logs the failures of a row of tries: as warnings the first one and
// each that is of another kind than the one before.
func (c *Client) grumbler(what string) func(error) {
	last := ""
	return func(err error) {
		log := c.cfg.Log.Debug
		if k := kind(err); k != last {
			log, last = c.cfg.Log.Warn, k
		}
		log(what+" failed, trying again", "error", err)
	}
}

// attest proves the node once, unless somebody else has replaced the identity
// while it waited for its turn.
func (c *Client) attest(ctx context.Context) error {
	before := c.cfg.Node.Identity()
	select {
	case c.proving <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-c.proving }()
	if c.cfg.Node.Identity() != before {
		return nil
	}
	refusal, err := c.presentHeld(ctx, before)
	if err != nil {
		return fmt.Errorf("present the agent SVID held: %w", err)
	}
	if refusal == nil && c.Identified() == nil {
		return nil
	}
	err = c.attestNow(ctx)
	if err != nil && refusal != nil {
		return fmt.Errorf("%w (the agent SVID held was not accepted, either: %w)", err, refusal)
	}
	return err
}

// presentHeld presents an SVID that is outside its life by this node's clock to
// the server, which accepts it when the clock is wrong. That comes before an
// attestation, because a join token cannot be had twice. It does nothing about
// an SVID in its life, one that has certainly ended, or one that the server has
// refused by name. It fails when the server could not be asked, and then nothing
// follows for the SVID.
func (c *Client) presentHeld(ctx context.Context, id *node.Identity) (refusal, err error) {
	if r := c.refused.Load(); id == nil || id.Ended() || (r != nil && r.identity == id) {
		return nil, nil
	}
	outside := id.ValidAt(c.cfg.Now())
	if outside == nil {
		return nil, nil
	}
	// The server refuses a certificate by ending the connection, which looks like
	// one that is lost. But it has presented its own before, and does it at once.
	var met atomic.Bool
	config := c.clientTLS(id)
	verify := config.VerifyConnection
	config.VerifyConnection = func(cs tls.ConnectionState) error {
		err := verify(cs)
		met.Store(err == nil)
		return err
	}
	l, err := c.open(id, config)
	if err != nil {
		return nil, err
	}
	defer l.conn.Close()
	ctx, cancel := context.WithTimeout(ctx, c.cfg.PollTimeout)
	defer cancel()
	began := time.Now()
	if _, err := c.getBundle(ctx, l.conn); err != nil {
		if !met.Load() || time.Since(began) >= connectTimeout {
			return nil, err
		}
		return err, nil
	}
	c.vouched.Store(id)
	c.cfg.Log.Warn("agent SVID accepted by the server though not valid by this node's clock", "error", outside)
	return nil, nil
}

// attestNow is for whoever holds proving. It uses a connection of its own that
// presents no identity, because the present one may be what the server refuses.
func (c *Client) attestNow(ctx context.Context) error {
	l, err := c.open(nil, c.clientTLS(nil))
	if err != nil {
		return err
	}
	defer l.conn.Close()
	ctx, cancel := context.WithTimeout(ctx, c.cfg.MintTimeout)
	defer cancel()
	// The bundle comes first: should the server sign with an authority that
	// the bundle in force does not have yet, then the answer could not be
	// verified, and the join token would be lost.
	trust, err := c.getBundle(ctx, l.conn)
	if err != nil {
		return fmt.Errorf("fetch bundle: %w", err)
	}
	if err := c.cfg.Node.Attest(ctx, l.conn, trust); err != nil {
		if banned(err) {
			return c.ban(err)
		}
		return fmt.Errorf("prove the node: %w", err)
	}
	c.fetched.Store(trust)
	now := time.Now()
	c.attested.Store(&now)
	c.replaced()
	return nil
}

// RenewNode replaces the node's own SVID: by renewal or, where the server wants
// that of this node, by a new proof. When it returns nil, new calls use the new
// one.
func (c *Client) RenewNode(ctx context.Context) error {
	if c.banned.Load() {
		return fmt.Errorf("renew agent SVID: %w", ErrBanned)
	}
	before := c.cfg.Node.Identity()
	select {
	case c.proving <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("renew agent SVID: %w", ctx.Err())
	}
	defer func() { <-c.proving }()
	held := c.cfg.Node.Identity()
	if held != before {
		return nil // replaced meanwhile
	}
	if held != nil && held.Reattestable {
		if err := c.attestNow(ctx); err != nil {
			return fmt.Errorf("renew agent SVID: %w", err)
		}
		return nil
	}
	err := c.call(ctx, "renew agent SVID", c.cfg.MintTimeout, needIdentity, func(ctx context.Context, l *link) error {
		return c.cfg.Node.Renew(ctx, l.conn)
	})
	if err == nil {
		c.replaced()
	}
	return err
}

// replaced is called after the server has made another identity: it is vouched
// for, and the connection of the one before is retired now instead of at the
// next call.
func (c *Client) replaced() {
	id := c.cfg.Node.Identity()
	c.vouched.Store(id)
	c.mu.Lock()
	defer c.mu.Unlock()
	if l := c.current; l != nil && l.identity != id {
		c.current = nil
		c.retire(l)
	}
}
