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
	Err   error    // why there is none, for this entry alone
}

// Minter requests X.509-SVIDs from the server. Mint returns one Result for each
// Request in the same order, or an error if the call as a whole failed, which says
// nothing about any entry. It returns within a deadline of its own and is safe for
// concurrent use.
type Minter interface {
	Mint(ctx context.Context, requests []Request) ([]Result, error)
}

// KeyType is the type of a workload's private key.
type KeyType string

// The key types.
const (
	ECP256  KeyType = "ec-p256"
	ECP384  KeyType = "ec-p384"
	RSA2048 KeyType = "rsa-2048"
)

// KeyTypes lists every KeyType.
var KeyTypes = []KeyType{ECP256, ECP384, RSA2048}

// Generate returns a new private key.
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

// errUnknownAuthority means that a chain ends in no authority of the trust bundle. A
// newer bundle may have it.
var errUnknownAuthority = errors.New("signed by an authority that is not in the trust bundle")

// attempt is one item of a mint call.
type attempt struct {
	item   *item
	entry  *cache.Entry
	held   *cache.SVID
	reason Reason
	key    crypto.Signer
	svid   *cache.SVID // the verified answer, or nil
	err    error
	// rejected means that err is from the verification of the answer.
	rejected bool
}

// mint sets svid or err of each attempt. It returns the error of the call as a whole.
// It runs on a worker and changes nothing but the attempts.
func (r *Renewer) mint(ctx context.Context, attempts []*attempt) error {
	requests := make([]Request, 0, len(attempts))
	asked := make([]*attempt, 0, len(attempts))
	for _, a := range attempts {
		key, err := r.cfg.KeyType.Generate()
		if err != nil {
			a.err = fmt.Errorf("generate key: %w", err)
			continue
		}
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		if err != nil {
			a.err = fmt.Errorf("create CSR: %w", err)
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

// verify checks the server's answer for an entry and returns it as an SVID: SPIFFE ID,
// key, time and chain (SPIFFE X.509-SVID, section 5). An SVID that was just signed and
// begins in this node's future means that this node's clock is behind. It is verified at
// its NotBefore.
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
	if !bundle.SameKey(leaf.PublicKey, key.Public()) {
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
	// A copy, so that an SVID does not keep its whole batch in memory.
	buf := make([]byte, 0, size)
	for _, der := range chain {
		buf = append(buf, der...)
	}
	svid.Leaf, svid.Intermediates = buf[:len(chain[0]):len(chain[0])], buf[len(chain[0]):]
	return svid, nil
}

// RenewAt returns when an SVID is due by its age: at half of its life, ±10 % by f, which
// is in [0, 1), so that SVIDs minted together are not renewed together.
func RenewAt(notBefore, notAfter time.Time, f float64) time.Time {
	half := float64(notAfter.Sub(notBefore)) / 2
	return notBefore.Add(time.Duration(half * (0.9 + 0.2*f)))
}
