package renew

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
)

// Request asks for one X.509-SVID.
type Request struct {
	EntryID string
	CSR     []byte // PKCS#10 DER; conveys the key only
}

// Result answers one Request.
type Result struct {
	Chain [][]byte // DER, leaf first, without the root
	Err   error    // why there is none; about this entry alone
}

// Minter asks the server for X.509-SVIDs. Mint returns one Result for each
// Request in the same order, or an error when the call as a whole failed,
// which says nothing about any entry. It returns within a deadline of its own
// and may be called concurrently.
type Minter interface {
	Mint(ctx context.Context, requests []Request) ([]Result, error)
}

// KeyType is the kind of key that workloads get.
type KeyType string

// The key types.
const (
	ECP256  KeyType = "ec-p256"
	ECP384  KeyType = "ec-p384"
	RSA2048 KeyType = "rsa-2048"
)

// KeyTypes lists every KeyType.
var KeyTypes = []KeyType{ECP256, ECP384, RSA2048}

// Generate makes a private key.
func (t KeyType) Generate() (crypto.Signer, error) {
	switch t {
	case ECP256:
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case ECP384:
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case RSA2048:
		return rsa.GenerateKey(rand.Reader, 2048)
	}
	return nil, fmt.Errorf("unknown key type %q: use one of %v", t, KeyTypes)
}

// errUnknownAuthority says that a chain ends in none of the authorities that
// this node knows, which a newer bundle may explain.
var errUnknownAuthority = errors.New("signed by an authority that the trust bundle does not have")

// attempt is one entry on its way through a mint call.
type attempt struct {
	item   *item
	entry  *cache.Entry
	held   *cache.SVID
	reason Reason
	key    crypto.Signer
	svid   *cache.SVID // the verified answer, or nil
	err    error
	// rejected says that err is about an answer that failed verification.
	rejected bool
}

// mint fills in svid or err for each attempt. The error is that of the call as
// a whole. It runs on a worker and touches nothing but its arguments.
func (r *Renewer) mint(ctx context.Context, attempts []*attempt) error {
	requests := make([]Request, 0, len(attempts))
	asked := make([]*attempt, 0, len(attempts))
	for _, a := range attempts {
		key, err := r.cfg.KeyType.Generate()
		if err != nil {
			a.err = fmt.Errorf("make key: %w", err)
			continue
		}
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		if err != nil {
			a.err = fmt.Errorf("make CSR: %w", err)
			continue
		}
		a.key = key
		asked = append(asked, a)
		requests = append(requests, Request{EntryID: a.entry.ID, CSR: csr})
	}
	results, err := r.cfg.Minter.Mint(ctx, requests)
	if err == nil && len(results) != len(requests) {
		err = fmt.Errorf("server answered %d of %d items", len(results), len(requests))
	}
	if err != nil {
		return err
	}
	snapshot := r.cfg.Cache.Bundle()
	for i, a := range asked {
		if a.err = results[i].Err; a.err == nil {
			a.svid, a.err = verify(a.entry, a.key, results[i].Chain, snapshot.Own, r.cfg.Now())
			a.rejected = a.err != nil
		}
	}
	return nil
}

// verify checks what the server answered for an entry and makes an SVID of it:
// SPIFFE ID, key, time and chain (SPIFFE X.509-SVID, section 5). The server has
// just signed it, so one that begins in this node's future says that this node's
// clock is behind, and is verified at the time when it begins.
func verify(e *cache.Entry, key crypto.Signer, chain [][]byte, own *bundle.Bundle, now time.Time) (*cache.SVID, error) {
	if len(chain) == 0 {
		return nil, errors.New("server answered without a certificate")
	}
	certs := make([]*x509.Certificate, len(chain))
	size := 0
	for i, der := range chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("parse certificate %d of the chain: %w", i, err)
		}
		certs[i] = cert
		size += len(der)
	}
	leaf := certs[0]
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		return nil, fmt.Errorf("read SPIFFE ID: %w", err)
	}
	if id != e.SPIFFEID {
		return nil, fmt.Errorf("SVID is for %q instead of %q", id, e.SPIFFEID)
	}
	if leaf.IsCA {
		return nil, errors.New("SVID is a CA certificate")
	}
	public, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(key.Public()) {
		return nil, errors.New("SVID is for another key than the one requested")
	}
	authority, err := own.Verify(leaf, certs[1:], later(now, leaf.NotBefore))
	if err != nil {
		if unknown := new(x509.UnknownAuthorityError); errors.As(err, unknown) {
			return nil, fmt.Errorf("%w: %w", errUnknownAuthority, err)
		}
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	svid := &cache.SVID{
		ID:        e.SPIFFEID,
		EntryID:   e.ID,
		Revision:  e.Revision,
		Created:   e.CreatedAt,
		TTL:       e.X509TTL,
		DNSNames:  leaf.DNSNames,
		Authority: authority,
		NotBefore: leaf.NotBefore,
		NotAfter:  leaf.NotAfter,
		Key:       keyDER,
	}
	// Copied, so that an SVID does not keep the whole answer of its batch alive.
	buf := make([]byte, 0, size)
	for _, der := range chain {
		buf = append(buf, der...)
	}
	svid.Leaf, svid.Intermediates = buf[:len(chain[0]):len(chain[0])], buf[len(chain[0]):]
	return svid, nil
}

// RenewAt draws when an SVID with this life is renewed: at half of it, ±10 %
// so that SVIDs minted together are not renewed together. f is in [0, 1).
func RenewAt(notBefore, notAfter time.Time, f float64) time.Time {
	half := float64(notAfter.Sub(notBefore)) / 2
	return notBefore.Add(time.Duration(half * (0.9 + 0.2*f)))
}
