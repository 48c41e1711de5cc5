package upstream

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/renewd/renewd/cache"
)

// entryMask selects the fields that this agent uses. SyncAuthorizedEntries requires
// the revision number. store_svid marks entries that are not for workloads.
var entryMask = &types.EntryMask{
	SpiffeId:       true,
	Selectors:      true,
	FederatesWith:  true,
	Hint:           true,
	RevisionNumber: true,
	CreatedAt:      true,
	StoreSvid:      true,
	// Like the SPIFFE ID these decide what an SVID contains: see [cache.SVID.For].
	DnsNames:             true,
	X509SvidTtl:          true,
	JwtSvidTtl:           true,
	AdditionalAttributes: true,
}

// parseEntry converts a server's entry, which must be of trust domain td.
func parseEntry(td spiffeid.TrustDomain, in *types.Entry) (*cache.Entry, error) {
	if in.GetId() == "" {
		return nil, errors.New("it has no ID")
	}
	of, err := spiffeid.TrustDomainFromString(in.GetSpiffeId().GetTrustDomain())
	if err != nil {
		return nil, fmt.Errorf("SPIFFE ID: %w", err)
	}
	if of != td {
		return nil, fmt.Errorf("SPIFFE ID: it is in trust domain %q", of.Name())
	}
	id, err := spiffeid.FromPath(of, in.GetSpiffeId().GetPath())
	if err != nil {
		return nil, fmt.Errorf("SPIFFE ID: %w", err)
	}
	if id.Path() == "" {
		return nil, errors.New("SPIFFE ID: it has no path")
	}
	if len(in.GetSelectors()) == 0 {
		// It would match every workload.
		return nil, errors.New("it has no selectors")
	}
	e := &cache.Entry{
		ID:        in.GetId(),
		SPIFFEID:  id,
		Selectors: make([]cache.Selector, len(in.GetSelectors())),
		Hint:      in.GetHint(),
		Revision:  in.GetRevisionNumber(),
		CreatedAt: unixTime(in.GetCreatedAt()),

		DNSNames:   in.GetDnsNames(),
		X509TTL:    time.Duration(in.GetX509SvidTtl()) * time.Second,
		JWTTTL:     time.Duration(in.GetJwtSvidTtl()) * time.Second,
		NoPrefetch: in.GetAdditionalAttributes().GetDisableX509SvidPrefetch(),
		IncludeJTI: in.GetAdditionalAttributes().GetJwtSvidIncludeJti(),
	}
	for i, sel := range in.GetSelectors() {
		if sel.GetType() == "" || sel.GetValue() == "" {
			return nil, fmt.Errorf("selector %d is incomplete", i)
		}
		e.Selectors[i] = cache.Selector{Type: sel.GetType(), Value: sel.GetValue()}
	}
	if e.FederatesWith, err = federatesWith(td, in); err != nil {
		return nil, err
	}
	return e, nil
}

// federatesWith returns the trust domains other than td that an entry federates
// with, sorted: a server may list them in another order each time.
func federatesWith(td spiffeid.TrustDomain, in *types.Entry) ([]spiffeid.TrustDomain, error) {
	var out []spiffeid.TrustDomain
	for _, name := range in.GetFederatesWith() {
		other, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return nil, fmt.Errorf("federates with: %w", err)
		}
		if other != td && !slices.Contains(out, other) {
			out = append(out, other)
		}
	}
	slices.SortFunc(out, spiffeid.TrustDomain.Compare)
	return out, nil
}
