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

// clockSkew is how far this node's clock may be behind the server's before a
// fresh SVID is refused as not yet valid.
const clockSkew = time.Minute

// The most that is taken for an own SVID. Real chains have two or three
// certificates of about 1 KiB.
const (
	maxChain = 10
	maxDER   = 64 << 10
)

// agentPath is where the IDs of attested nodes live in every trust domain of a
// SPIRE server, and nothing else does.
const agentPath = "/spire/agent/"

// Identity is the node's own SVID with its private key. It is immutable and
// may be shared freely.
type Identity struct {
	Key crypto.Signer
	// Chain is the SVID: leaf first, then intermediates, without the root. It
	// is never empty.
	Chain []*x509.Certificate
	// Reattestable says that the server wants this node to prove itself again
	// instead of renewing.
	Reattestable bool
}

// ID is the node's SPIFFE ID.
func (i *Identity) ID() spiffeid.ID {
	id, err := x509svid.IDFromCert(i.Chain[0])
	if err != nil {
		return spiffeid.ID{} // not reached: every Identity was checked when it was made
	}
	return id
}

// Expired reports whether the SVID is of no use any more at the time now.
func (i *Identity) Expired(now time.Time) bool { return !now.Before(i.Chain[0].NotAfter) }

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

// verify checks what has to hold of an SVID that was issued just now.
func (i *Identity) verify(td spiffeid.TrustDomain, trust *bundle.Bundle, now time.Time) error {
	leaf, id := i.Chain[0], i.ID()
	switch {
	case !id.MemberOf(td):
		return fmt.Errorf("%q is not in trust domain %q", id, td.Name())
	case leaf.NotBefore.After(now.Add(clockSkew)):
		return fmt.Errorf("the SVID of %q is valid from %s on: compare the clocks of this node and the server", id, leaf.NotBefore.UTC().Format(time.RFC3339))
	case i.Expired(now):
		return fmt.Errorf("the SVID of %q expired at %s: compare the clocks of this node and the server", id, leaf.NotAfter.UTC().Format(time.RFC3339))
	case trust == nil:
		return errors.New("there is no trust bundle to verify the SVID with")
	}
	at := now
	if leaf.NotBefore.After(at) {
		at = leaf.NotBefore
	}
	_, err := trust.Verify(leaf, i.Chain[1:], at)
	return err
}

func samePublic(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}
