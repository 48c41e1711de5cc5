package upstream

import (
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/agent/node"
)

// refusal is an identity that the server has refused, and its error.
type refusal struct {
	identity *node.Identity
	err      error
}

// verdict caches whether the authority of an identity was removed: finding out
// costs a signature check.
type verdict struct {
	identity       *node.Identity
	force, fetched *bundle.Bundle
	err            error
}

// usable returns the identity for calls or, with a nil identity, why there is none.
// An SVID that has expired, or whose authority was removed, is not presented: the
// server would end the handshake, even for a fetch of the bundle. The server's clock
// decides whether an SVID has expired. One that is outside its lifetime by this
// node's clock is presented if the server has accepted it.
func (c *Client) usable() (*node.Identity, error) {
	id := c.cfg.Node.Identity()
	if id == nil {
		return nil, errors.New("there is no agent SVID yet")
	}
	if err := id.ValidAt(c.cfg.Now()); err != nil && (c.accepted.Load() != id || id.CertainlyExpired()) {
		return nil, err
	}
	force, fetched := c.cfg.Bundle(), c.fetched.Load()
	v := c.judged.Load()
	if v == nil || v.identity != id || v.force != force || v.fetched != fetched {
		v = &verdict{id, force, fetched, authorityRemoved(id, force, fetched)}
		c.judged.Store(v)
	}
	if v.err != nil {
		return nil, v.err
	}
	return id, nil
}

// authorityRemoved returns an error when neither the bundle in force nor the last
// one fetched has the authority of the identity. One alone does not suffice: the
// bundle in force may be the bootstrap's, older than the identity, and the one
// fetched may come from a replica that lags.
func authorityRemoved(id *node.Identity, force, fetched *bundle.Bundle) error {
	if force == nil || fetched == nil {
		return nil
	}
	leaf := id.Chain[0]
	at := leaf.NotBefore // usable checks the expiry
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

// Identified returns nil when there is an identity that the server has not refused,
// and otherwise the reason.
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

// Attested returns when this Client last attested the node, with a monotonic clock
// reading. It is zero when the identity is from the last run.
func (c *Client) Attested() time.Time {
	if at := c.attested.Load(); at != nil {
		return *at
	}
	return time.Time{}
}

// useNewIdentity marks the identity as accepted, because the server has just signed
// it, and retires the connection of the one before now instead of at the next call.
func (c *Client) useNewIdentity() {
	id := c.cfg.Node.Identity()
	c.accepted.Store(id)
	c.mu.Lock()
	defer c.mu.Unlock()
	if l := c.current; l != nil && l.identity != id {
		c.current = nil
		c.retireLocked(l)
	}
}
