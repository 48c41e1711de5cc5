package svidstore

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/renewd/renewd/cache"
)

// recordVersion is the version of a file's content. Version 0 lacks the entry's fields
// from dns_names to include_jti.
const recordVersion = 1

// record is the content of one file.
type record struct {
	Version       int              `json:"version"`
	ID            string           `json:"id"`
	SPIFFEID      string           `json:"spiffe_id"`
	Selectors     []cache.Selector `json:"selectors"`
	FederatesWith []string         `json:"federates_with,omitempty"`
	Hint          string           `json:"hint,omitempty"`
	DNSNames      []string         `json:"dns_names,omitempty"`
	X509TTL       time.Duration    `json:"x509_ttl,omitempty"` // nanoseconds, as all durations
	JWTTTL        time.Duration    `json:"jwt_ttl,omitempty"`
	NoPrefetch    bool             `json:"no_prefetch,omitempty"`
	IncludeJTI    bool             `json:"include_jti,omitempty"`
	Revision      int64            `json:"revision"`
	CreatedAt     time.Time        `json:"created_at"`
	SVID          svid             `json:"svid"`
}

type svid struct {
	Leaf          []byte        `json:"leaf"`
	Intermediates []byte        `json:"intermediates,omitempty"`
	Key           []byte        `json:"key"`
	Authority     string        `json:"authority"`
	Revision      int64         `json:"revision"`
	Created       time.Time     `json:"created_at"`
	TTL           time.Duration `json:"ttl,omitempty"`
	NotBefore     time.Time     `json:"not_before"`
	NotAfter      time.Time     `json:"not_after"`
	RenewAt       time.Time     `json:"renew_at"`
}

func read(path string) (*cache.Entry, *cache.SVID, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, err
	}
	return decode(data)
}

func decode(data []byte) (*cache.Entry, *cache.SVID, error) {
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		// json's error may quote the content, which has a key.
		return nil, nil, errors.New("not a record of this agent")
	}
	id, err := spiffeid.FromString(r.SPIFFEID)
	if err != nil {
		return nil, nil, fmt.Errorf("SPIFFE ID: %w", err)
	}
	if r.ID == "" || len(r.Selectors) == 0 || len(r.SVID.Leaf) == 0 || len(r.SVID.Key) == 0 || r.SVID.Authority == "" {
		return nil, nil, errors.New("record is incomplete")
	}
	e := &cache.Entry{
		ID: r.ID, SPIFFEID: id, Selectors: r.Selectors, Hint: r.Hint, DNSNames: r.DNSNames, X509TTL: r.X509TTL, JWTTTL: r.JWTTTL,
		NoPrefetch: r.NoPrefetch, IncludeJTI: r.IncludeJTI, Revision: r.Revision, CreatedAt: r.CreatedAt,
	}
	if r.Version < recordVersion {
		// Never equal to the server's revision, so the next sync fetches the entry.
		e.Revision = -1
	}
	for _, name := range r.FederatesWith {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return nil, nil, fmt.Errorf("federates with: %w", err)
		}
		e.FederatesWith = append(e.FederatesWith, td)
	}
	// The SPIFFE ID and DNS names are the certificate's, because the entry may have
	// changed since the SVID was signed.
	leaf, err := x509.ParseCertificate(r.SVID.Leaf)
	if err != nil {
		return nil, nil, fmt.Errorf("parse SVID: %w", err)
	}
	svidID, err := x509svid.IDFromCert(leaf)
	if err != nil {
		return nil, nil, fmt.Errorf("read SPIFFE ID of the SVID: %w", err)
	}
	s := &cache.SVID{
		ID: svidID, EntryID: r.ID, Revision: r.SVID.Revision, Created: r.SVID.Created, TTL: r.SVID.TTL, DNSNames: leaf.DNSNames,
		Leaf: r.SVID.Leaf, Intermediates: r.SVID.Intermediates, Key: r.SVID.Key,
		Authority: r.SVID.Authority, NotBefore: r.SVID.NotBefore, NotAfter: r.SVID.NotAfter, RenewAt: r.SVID.RenewAt,
	}
	return e, s, nil
}

func encode(e *cache.Entry, s *cache.SVID) ([]byte, error) {
	r := record{
		Version: recordVersion, ID: e.ID, SPIFFEID: e.SPIFFEID.String(), Selectors: e.Selectors, Hint: e.Hint, DNSNames: e.DNSNames,
		X509TTL: e.X509TTL, JWTTTL: e.JWTTTL, NoPrefetch: e.NoPrefetch, IncludeJTI: e.IncludeJTI, Revision: e.Revision, CreatedAt: e.CreatedAt,
		SVID: svid{Leaf: s.Leaf, Intermediates: s.Intermediates, Key: s.Key, Authority: s.Authority, Revision: s.Revision, Created: s.Created, TTL: s.TTL,
			NotBefore: s.NotBefore, NotAfter: s.NotAfter, RenewAt: s.RenewAt},
	}
	for _, td := range e.FederatesWith {
		r.FederatesWith = append(r.FederatesWith, td.Name())
	}
	return json.Marshal(r)
}
