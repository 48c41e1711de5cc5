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
// whose clocks lag a little can use it at once. Hence NotBefore of a fresh SVID
// is the server's word on what time it is.
const backdate = 10 * time.Second

// The most that is taken for an agent SVID. Real chains have two or three
// certificates of about 1 KiB.
const (
	maxChain = 10
	maxDER   = 64 << 10
)

// agentPath is where the IDs of attested nodes live in every trust domain of a
// SPIRE server, and nothing else does.
const agentPath = "/spire/agent/"

// Identity is the agent SVID with its private key. It is immutable and
// may be shared freely.
type Identity struct {
	Key crypto.Signer
	// Chain is the SVID: leaf first, then intermediates, without the root. It
	// is never empty.
	Chain []*x509.Certificate
	// Reattestable says that the server wants this node to prove itself again
	// instead of renewing.
	Reattestable bool

	// When it was received, by the clock that is never set and by the wall
	// clock; zero when it was loaded.
	received, wall time.Time
}

// ID is the node's SPIFFE ID.
func (i *Identity) ID() spiffeid.ID {
	id, err := x509svid.IDFromCert(i.Chain[0])
	if err != nil {
		return spiffeid.ID{} // not reached: every Identity was checked when it was made
	}
	return id
}

// ValidAt returns an error when the SVID is not valid at the time now: it has
// ended, or not begun. If now is read from a clock that is wrong, the server may
// accept the SVID all the same, unless it has Ended. The text is the same at
// each call.
func (i *Identity) ValidAt(now time.Time) error {
	leaf := i.Chain[0]
	switch {
	case i.Ended():
		return fmt.Errorf("the agent SVID has expired: it was for %v", i.Life())
	case now.Before(leaf.NotBefore):
		return fmt.Errorf("the agent SVID begins at %s, which is still to come by this node's clock: set the clock", leaf.NotBefore.UTC().Format(time.RFC3339))
	case !now.Before(leaf.NotAfter):
		return fmt.Errorf("the agent SVID expired at %s by this node's clock", leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// Ended reports whether the SVID has expired whatever the wall clock says: it
// was received longer ago than it lives, by the clock that is never set.
func (i *Identity) Ended() bool { return !i.received.IsZero() && time.Since(i.received) >= i.Life() }

// Life is how long an SVID can be used once it was made.
func (i *Identity) Life() time.Duration {
	return i.Chain[0].NotAfter.Sub(i.Chain[0].NotBefore) - backdate
}

// Age is how long ago the SVID was made, as far as this node can tell at the
// time now. Since it was received counts by the wall clock, which may be set, or
// by the monotonic one, which stands still while a machine is suspended:
// whichever says more. Of one that was loaded only its own times tell; when they
// are still to come the age is negative and not known.
func (i *Identity) Age(now time.Time) time.Duration {
	if i.received.IsZero() {
		return now.Sub(i.Chain[0].NotBefore) - backdate
	}
	return max(now.Round(0).Sub(i.wall.Round(0)), time.Since(i.received))
}

// TLSCertificate is the identity as a TLS client presents it.
func (i *Identity) TLSCertificate() tls.Certificate {
	out := tls.Certificate{PrivateKey: i.Key, Leaf: i.Chain[0], Certificate: make([][]byte, len(i.Chain))}
	for n, c := range i.Chain {
		out.Certificate[n] = c.Raw
	}
	return out
}

// newIdentity makes an Identity of a key and an SVID. It checks what has to
// hold at any time: the SVID is a node's and belongs to the key (SPIFFE
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
		return nil, fmt.Errorf("the certificate of %q is an authority's", id)
	case !samePublic(leaf.PublicKey, key.Public()):
		return nil, fmt.Errorf("the SVID of %q is for another key", id)
	}
	return &Identity{Key: key, Chain: chain, Reattestable: reattestable}, nil
}

// verify checks what has to hold of an SVID that was issued just now. What time
// it is, the server knows: it has made the SVID, and judges it when it is used.
// So the SVID is verified at the time that it was made at, if this node's clock
// is outside its life.
func (i *Identity) verify(td spiffeid.TrustDomain, trust *bundle.Bundle, now time.Time) error {
	leaf, id := i.Chain[0], i.ID()
	switch {
	case !id.MemberOf(td):
		return fmt.Errorf("%q is not in trust domain %q", id, td.Name())
	case i.Life() <= 0:
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

func samePublic(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}
