package agent_test

import (
	"crypto/x509"
	"net/url"
	"slices"
	"time"

	svidpb "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/renewd/renewd/internal/server/spireapi"
)

// noteStatesLocked records states of entries.
func (w *world) noteStatesLocked(entries []spireapi.StoredEntry) {
	if w.states == nil {
		w.states = make(map[string][]spireapi.StoredEntry)
	}
	for _, e := range entries {
		of := w.states[e.SPIFFEID.String()]
		if !slices.ContainsFunc(of, func(s spireapi.StoredEntry) bool { return s.ID == e.ID && s.Revision == e.Revision }) {
			w.states[e.SPIFFEID.String()] = append(of, e)
		}
	}
}

// assigns reports whether an entry, in one of its states for which fits returns true,
// assigns the SPIFFE ID to a workload with these selectors.
func (w *world) assigns(id string, values []string, fits func(spireapi.StoredEntry) bool) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.ContainsFunc(w.states[id], func(e spireapi.StoredEntry) bool {
		return fits(e) && !slices.ContainsFunc(e.Selectors, func(s spireapi.Selector) bool { return !slices.Contains(values, s.Value) })
	})
}

// wireEntry returns an entry as a server sends it.
func wireEntry(e spireapi.StoredEntry) *types.Entry {
	out := &types.Entry{
		Id: e.ID, SpiffeId: &types.SPIFFEID{TrustDomain: e.SPIFFEID.TrustDomain().Name(), Path: e.SPIFFEID.Path()},
		Hint: e.Hint, RevisionNumber: e.Revision, CreatedAt: e.CreatedAt.Unix(),
	}
	for _, s := range e.Selectors {
		out.Selectors = append(out.Selectors, &types.Selector{Type: s.Type, Value: s.Value})
	}
	return out
}

// replica makes the agent ask a server with another list of entries, which signs SVIDs
// by that list.
func (w *world) replica(list func([]*types.Entry) []*types.Entry) {
	by := w.record(w.server.Keysets().Active().ID)
	current := func() []*types.Entry {
		var out []*types.Entry
		for _, e := range w.server.Entries() {
			out = append(out, wireEntry(e))
		}
		return out
	}
	w.set(func(f *faults) {
		f.list = list
		f.garble = func(req *svidpb.BatchNewX509SVIDRequest, res *svidpb.BatchNewX509SVIDResponse) *svidpb.BatchNewX509SVIDResponse {
			has := list(current())
			for i, p := range req.Params {
				at := slices.IndexFunc(has, func(e *types.Entry) bool { return e.Id == p.EntryId })
				switch r := res.Results[i]; {
				case at < 0:
					res.Results[i] = &svidpb.BatchNewX509SVIDResponse_Result{Status: &types.Status{Code: int32(codes.NotFound), Message: "entry not found"}}
				case r.Svid != nil:
					leaf, err := x509.ParseCertificate(r.Svid.CertChain[0])
					w.check(err)
					r.Svid.CertChain[0] = signWith(by, leaf, func(c *x509.Certificate) {
						c.URIs = []*url.URL{{Scheme: "spiffe", Host: td.Name(), Path: has[at].SpiffeId.Path}}
					})
				}
			}
			return res
		}
	})
}

// correct makes the agent ask the correct server again, and waits for its list.
func (w *world) correct() {
	w.t.Helper()
	w.set(func(f *faults) { *f = faults{} })
	w.mu.Lock()
	from := w.listings
	w.mu.Unlock()
	w.until("the correct server was asked", time.Minute, func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.listings >= from+2
	})
}
