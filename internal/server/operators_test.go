package server_test

import (
	"slices"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
)

// TestOperatorEntries: an agent gets the SVID of an operator, and with it the operator's
// role, only if the entry names that agent as its parent or has operator set.
func TestOperatorEntries(t *testing.T) {
	t.Parallel()
	r := run(t, newConfig(t, "default"))
	home, other := r.join("default"), r.join("default")
	for name, tt := range map[string]struct {
		entry           *api.Entry
		code            codes.Code
		atHome, atOther codes.Code // of a request for an SVID, if the entry is accepted
	}{
		"manager, every agent":             {entry: operatorEntry("alice", spiffeid.ID{}, false), code: codes.InvalidArgument},
		"reader, every agent":              {entry: operatorEntry("bob", spiffeid.ID{}, false), code: codes.InvalidArgument},
		"manager, one agent":               {entry: operatorEntry("alice", home.id, false), atOther: codes.NotFound},
		"manager, every agent, on purpose": {entry: operatorEntry("alice", spiffeid.ID{}, true)},
		"no operator, every agent":         {entry: operatorEntry("carol", spiffeid.ID{}, false)},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			for _, dryRun := range []bool{true, false} {
				_, err := r.api.ApplyEntries(ctx, &api.ApplyEntriesRequest{Entries: []*api.Entry{tt.entry}, DryRun: dryRun, Remove: new(int64(0))})
				if status.Code(err) != tt.code {
					t.Errorf("apply, dry run %v: %v", dryRun, err)
				}
			}
			put, err := r.api.PutEntry(ctx, &api.PutEntryRequest{Entry: tt.entry})
			if status.Code(err) != tt.code {
				t.Errorf("put: %v", err)
			}
			if err != nil {
				return
			}
			if got := put.GetChange().GetAfter().GetOperator(); got != tt.entry.GetOperator() {
				t.Errorf("operator: %v", got)
			}
			for caller, want := range map[*agent]codes.Code{home: tt.atHome, other: tt.atOther} {
				_, csr := newKey(t)
				resp, err := caller.BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: tt.entry.GetId(), Csr: csr}}})
				check(t, err)
				if got := codes.Code(resp.GetResults()[0].GetStatus().GetCode()); got != want {
					t.Errorf("SVID for %s: %v, want %v", caller.id, got, want)
				}
			}
			_, err = r.api.DeleteEntry(ctx, &api.DeleteEntryRequest{Id: tt.entry.GetId()})
			check(t, err)
		})
	}
}

// TestOperatorEntriesThatAreStored: if the SPIFFE ID of a stored entry for every agent
// becomes an operator's, each start logs the entry until it is corrected.
func TestOperatorEntriesThatAreStored(t *testing.T) {
	t.Parallel()
	c := newConfig(t, "default")
	managers := c.Managers
	c.Managers = managers[:2] // no SPIFFE ID
	r := run(t, c)
	for _, e := range []*api.Entry{operatorEntry("alice", spiffeid.ID{}, false), operatorEntry("carol", spiffeid.ID{}, false)} {
		_, err := r.api.PutEntry(t.Context(), &api.PutEntryRequest{Entry: e})
		check(t, err)
	}
	listed := func(step string, want ...string) {
		t.Helper()
		if !slices.Equal(r.start.refused, want) {
			t.Errorf("%s: entries %q are listed, want %q", step, r.start.refused, want)
		}
	}
	listed("no operator")
	r.stop()
	c.Managers = managers
	for range 2 {
		r = run(t, c)
		listed("alice is a manager", "alice")
		_, err := r.api.PutEntry(t.Context(), &api.PutEntryRequest{Entry: operatorEntry("carol", spiffeid.ID{}, false)})
		check(t, err) // other entries can be changed
		r.stop()
	}
	r = run(t, c)
	_, err := r.api.PutEntry(t.Context(), &api.PutEntryRequest{Entry: operatorEntry("alice", spiffeid.ID{}, true)})
	check(t, err)
	r.stop()
	r = run(t, c)
	listed("the entry has operator set")
}
