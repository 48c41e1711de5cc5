package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/renewd/renewd/internal/agent/node"
)

const (
	// attestPause is how long ago the last attestation must be for the next one to
	// start without a pause.
	attestPause = time.Minute
	// evictionWindow is how long after an attestation a refusal of its SVID as not
	// active means that another agent has attested with the same node identity. It is
	// longer than the longest pause of such an agent, see newEvictionPace.
	evictionWindow = 15 * time.Minute
	// shared is the subject of the log line about such an agent.
	shared = "shared node identity"
)

// attestation is a series of attempts in the background to attest the node.
type attestation struct{ done chan struct{} }

// Attest returns nil when the node has a usable identity. Otherwise it attests the
// node, with growing random pauses between attempts, until that succeeds or ctx is
// done. It fails at once with [ErrBanned], and with [node.ErrNoCredential] when there
// is no identity and nothing is configured to attest with.
func (c *Client) Attest(ctx context.Context) error {
	for {
		if c.banned.Load() {
			return ErrBanned
		}
		if _, err := c.usable(); err == nil {
			return nil
		}
		// An identity may have expired by a wrong clock only.
		if err := c.cfg.Node.CanAttest(ctx); errors.Is(err, node.ErrNoCredential) && c.cfg.Node.Identity() == nil {
			return err
		}
		p := c.startAttesting()
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

// startAttesting starts the background attestation unless it is in progress, and
// returns it. It returns nil when the Client is closed.
func (c *Client) startAttesting() *attestation {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil
	}
	if c.attesting == nil {
		p := &attestation{done: make(chan struct{})}
		c.attesting = p
		c.work.Go(func() {
			c.keepAttesting()
			c.mu.Lock()
			c.attesting = nil
			c.mu.Unlock()
			close(p.done)
		})
	}
	return c.attesting
}

// keepAttesting tries until the node is attested or banned, or the Client closed.
func (c *Client) keepAttesting() {
	failures := c.failures()
	if sleep(c.ctx, c.pauseBeforeAttesting()) != nil {
		return
	}
	for c.Identified() != nil && !c.banned.Load() {
		err := c.attest(c.ctx)
		if err == nil || c.ctx.Err() != nil || c.banned.Load() {
			return
		}
		failures.Note(slog.LevelWarn, "attestation failed, trying again", withoutNumbers(err), "error", err)
		if sleep(c.ctx, c.pace.NextBackOff()) != nil {
			return
		}
	}
}

// pauseBeforeAttesting returns how long to wait before the first attempt. Two agents with
// one node identity, such as two machines with one certificate, evict each other with
// every attestation. Their pauses grow to minutes, and the log names the remedy.
func (c *Client) pauseBeforeAttesting() time.Duration {
	at := c.Attested()
	since := time.Since(at)
	if !at.IsZero() && since < evictionWindow && c.evicted() {
		pause := c.evictionPace.NextBackOff()
		c.lines.Note(slog.LevelWarn, "agent SVID revoked by another attestation of the same node identity: give each agent a credential of its own", shared,
			"spiffe_id", c.cfg.Node.Identity().ID().String(), "delay", pause.Round(time.Millisecond).String())
		return pause
	}
	c.evictionPace.Reset()
	c.lines.Over(shared, "node identity used by this agent alone")
	if at.IsZero() || since >= attestPause {
		c.pace.Reset()
		return 0
	}
	return c.pace.NextBackOff()
}

// evicted reports whether the server has refused the identity held as not active, and not
// because this agent is replacing it.
func (c *Client) evicted() bool {
	r := c.refused.Load()
	return r != nil && r.identity == c.cfg.Node.Identity() && r.identity != nil && len(c.identityTurn) == 0 &&
		denial(r.err) == types.PermissionDeniedDetails_AGENT_NOT_ACTIVE
}

// attest makes one attempt to attest the node, unless the identity was replaced
// while it waited for identityTurn.
func (c *Client) attest(ctx context.Context) error {
	before := c.cfg.Node.Identity()
	select {
	case c.identityTurn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-c.identityTurn }()
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
	err = c.attestOnce(ctx)
	if err != nil && refusal != nil {
		return fmt.Errorf("%w (the agent SVID held was not accepted, either: %w)", err, refusal)
	}
	return err
}

// presentHeld presents an SVID that is outside its lifetime by this node's clock to
// the server, which accepts it when that clock is wrong. So a wrong clock costs no
// join token. It does nothing for an SVID that is within its lifetime, has certainly
// expired, or was refused by the server before. refusal is the server's refusal; err
// means that the server could not be asked.
func (c *Client) presentHeld(ctx context.Context, id *node.Identity) (refusal, err error) {
	if r := c.refused.Load(); id == nil || id.CertainlyExpired() || (r != nil && r.identity == id) {
		return nil, nil
	}
	outside := id.ValidAt(c.cfg.Now())
	if outside == nil {
		return nil, nil
	}
	// The server refuses a certificate by ending the connection. Unlike a lost
	// connection that happens at once and after the server was verified.
	var seen atomic.Bool
	config := c.clientTLS(id)
	verify := config.VerifyConnection
	config.VerifyConnection = func(cs tls.ConnectionState) error {
		err := verify(cs)
		seen.Store(err == nil)
		return err
	}
	l, err := c.open(id, config)
	if err != nil {
		return nil, err
	}
	defer l.conn.Close()
	ctx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	began := time.Now()
	if _, err := c.getBundle(ctx, l.conn); err != nil {
		if !seen.Load() || time.Since(began) >= connectTimeout {
			return nil, err
		}
		return err, nil
	}
	c.accepted.Store(id)
	c.cfg.Log.Warn("agent SVID accepted by the server, not valid by this node's clock", "error", outside)
	return nil, nil
}

// attestOnce attests the node. The caller holds identityTurn. It uses a separate
// anonymous connection, because the server may refuse the identity held.
func (c *Client) attestOnce(ctx context.Context) error {
	// A node without its credential may try for days: do not call the server for that.
	if err := c.cfg.Node.CanAttest(ctx); err != nil {
		return fmt.Errorf("attest the node: %w", err)
	}
	l, err := c.open(nil, c.clientTLS(nil))
	if err != nil {
		return err
	}
	defer l.conn.Close()
	ctx, cancel := context.WithTimeout(ctx, mintTimeout)
	defer cancel()
	// Fetch the bundle first: if the server signs with an authority that the
	// bundle in force lacks, the answer could not be verified, and the join token
	// would be lost.
	trust, err := c.getBundle(ctx, l.conn)
	if err != nil {
		return fmt.Errorf("fetch bundle: %w", err)
	}
	if err := c.cfg.Node.Attest(ctx, l.conn, trust); err != nil {
		if banned(err) {
			return c.ban(err)
		}
		return fmt.Errorf("attest the node: %w", err)
	}
	c.fetched.Store(trust)
	now := time.Now()
	c.attested.Store(&now)
	c.useNewIdentity()
	return nil
}

// RenewNode replaces the agent SVID, by renewal or, when the server requires that
// of this node, by re-attestation. When it returns nil, new calls use the new SVID. When
// it fails, the one held stays in use.
func (c *Client) RenewNode(ctx context.Context) error {
	if c.banned.Load() {
		return fmt.Errorf("renew agent SVID: %w", ErrBanned)
	}
	before := c.cfg.Node.Identity()
	select {
	case c.identityTurn <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("renew agent SVID: %w", ctx.Err())
	}
	defer func() { <-c.identityTurn }()
	held := c.cfg.Node.Identity()
	if held != before {
		return nil // replaced meanwhile
	}
	reattest := held != nil && held.Reattestable
	if !reattest {
		err := c.call(ctx, "renew agent SVID", mintTimeout, needIdentity, func(ctx context.Context, l *link) error {
			err := c.cfg.Node.Renew(ctx, l.conn)
			if denial(err) == types.PermissionDeniedDetails_AGENT_MUST_REATTEST {
				// Only the renewal is refused: the SVID held is good for other calls.
				reattest = true
				return nil
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	if reattest {
		if err := c.attestOnce(ctx); err != nil {
			return fmt.Errorf("renew agent SVID: %w", err)
		}
		return nil
	}
	c.useNewIdentity()
	return nil
}
