package node

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/renewd/renewd/bundle"
)

// backdate is how far back a SPIRE server dates what it signs, so that nodes
// whose clocks lag a little can use it at once. So NotBefore of a new SVID tells the
// server's time.
const backdate = 10 * time.Second

// Limits of an agent SVID. Real chains have two or three certificates of about 1 KiB.
const (
	maxChain = 10
	maxDER   = 64 << 10
)

// agentPath begins the path of every node's SPIFFE ID, and of no other, in the trust
// domain of a SPIRE server.
const agentPath = "/spire/agent/"

// Identity is the agent SVID with its private key. It is immutable and safe for
// concurrent use.
type Identity struct {
	Key crypto.Signer
	// Chain is the SVID: leaf first, then intermediates, without the root. It
	// is never empty.
	Chain []*x509.Certificate
	// Reattestable is set when the server requires re-attestation of this node
	// instead of renewal.
	Reattestable bool

	// When it was received, by the monotonic and by the wall clock; zero when it
	// was loaded.
	received, wall time.Time
}

// ID returns the node's SPIFFE ID.
func (i *Identity) ID() spiffeid.ID {
	id, err := x509svid.IDFromCert(i.Chain[0])
	if err != nil {
		return spiffeid.ID{} // not reached: newIdentity checks it
	}
	return id
}

// ValidAt returns an error when the SVID has expired at the time now or is not valid
// yet. If the clock that now is from is wrong, the server may still accept the SVID,
// unless it is CertainlyExpired. The error's text does not depend on now.
func (i *Identity) ValidAt(now time.Time) error {
	leaf := i.Chain[0]
	switch {
	case i.CertainlyExpired():
		return fmt.Errorf("the agent SVID has expired: it was for %v", i.Lifetime())
	case now.Before(leaf.NotBefore):
		return fmt.Errorf("the agent SVID is not valid before %s by this node's clock: set the clock", leaf.NotBefore.UTC().Format(time.RFC3339))
	case !now.Before(leaf.NotAfter):
		return fmt.Errorf("the agent SVID expired at %s by this node's clock", leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// CertainlyExpired reports whether the SVID has expired whatever the wall clock shows:
// by the monotonic clock it was received longer ago than its lifetime.
func (i *Identity) CertainlyExpired() bool {
	return !i.received.IsZero() && time.Since(i.received) >= i.Lifetime()
}

// Lifetime returns how long the SVID is valid after it was signed.
func (i *Identity) Lifetime() time.Duration {
	return i.Chain[0].NotAfter.Sub(i.Chain[0].NotBefore) - backdate
}

// Age returns how long ago the SVID was signed, as far as this node knows at the time
// now. For a received SVID it is the larger of two times since then: by the wall
// clock, which may be set, and by the monotonic clock, which stops while the machine
// is suspended. For a loaded SVID it follows from NotBefore; a negative age is
// unknown.
func (i *Identity) Age(now time.Time) time.Duration {
	if i.received.IsZero() {
		return now.Sub(i.Chain[0].NotBefore) - backdate
	}
	return max(now.Round(0).Sub(i.wall.Round(0)), time.Since(i.received))
}

// TLSCertificate returns the identity as a certificate for crypto/tls.
func (i *Identity) TLSCertificate() tls.Certificate {
	out := tls.Certificate{PrivateKey: i.Key, Leaf: i.Chain[0], Certificate: make([][]byte, len(i.Chain))}
	for n, c := range i.Chain {
		out.Certificate[n] = c.Raw
	}
	return out
}

// newIdentity returns the Identity of a key and an SVID. It checks what does not
// depend on the time: the SVID is a node's and belongs to the key (SPIFFE
// X.509-SVID, sections 2, 4 and 5.2).
func newIdentity(key crypto.Signer, der [][]byte, reattestable bool) (*Identity, error) {
	if len(der) == 0 {
		return nil, errors.New("there is no certificate")
	}
	if len(der) > maxChain {
		return nil, fmt.Errorf("the chain has %d certificates, at most %d are accepted", len(der), maxChain)
	}
	chain := make([]*x509.Certificate, len(der))
	for i, b := range der {
		if len(b) > maxDER {
			return nil, fmt.Errorf("certificate %d has %d bytes, at most %d are accepted", i, len(b), maxDER)
		}
		c, err := x509.ParseCertificate(b)
		if err != nil {
			return nil, fmt.Errorf("parse certificate %d: %w", i, err)
		}
		chain[i] = c
	}
	leaf := chain[0]
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		return nil, fmt.Errorf("read the SPIFFE ID: %w", err)
	}
	switch {
	case !strings.HasPrefix(id.Path(), agentPath):
		return nil, fmt.Errorf("%q is not the ID of a node: it is not below %s", id, agentPath)
	case leaf.IsCA:
		return nil, fmt.Errorf("the certificate of %q is a CA certificate", id)
	case !bundle.SameKey(leaf.PublicKey, key.Public()):
		return nil, fmt.Errorf("the SVID of %q is for another key", id)
	}
	return &Identity{Key: key, Chain: chain, Reattestable: reattestable}, nil
}

// verify checks a new SVID. If it is outside its lifetime by this node's clock, it is
// verified at its NotBefore instead: the server has just signed it, and it is the
// server's clock that counts when it is used.
func (i *Identity) verify(td spiffeid.TrustDomain, trust *bundle.Bundle, now time.Time) error {
	leaf, id := i.Chain[0], i.ID()
	switch {
	case !id.MemberOf(td):
		return fmt.Errorf("%q is not in trust domain %q", id, td.Name())
	case i.Lifetime() <= 0:
		return fmt.Errorf("the SVID of %q had expired when it was issued: it is from %s to %s", id,
			leaf.NotBefore.UTC().Format(time.RFC3339), leaf.NotAfter.UTC().Format(time.RFC3339))
	case trust == nil:
		return errors.New("there is no trust bundle to verify the SVID with")
	}
	if i.ValidAt(now) != nil {
		now = leaf.NotBefore
	}
	_, err := trust.Verify(leaf, i.Chain[1:], now)
	return err
}
