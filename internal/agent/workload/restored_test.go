package workload

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
)

// A caller gets PermissionDenied for a SPIFFE ID only if it is known that it has no
// entry for it.
func TestJWTForAPossiblyUnknownID(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		attestors []attest.Attestor
		restored  bool
		want      codes.Code
	}{
		"known":                        {[]attest.Attestor{byUID{}}, false, codes.PermissionDenied},
		"an attestor failed":           {[]attest.Attestor{byUID{}, byUID{err: func() error { return errors.New("down") }}}, false, codes.Unavailable},
		"the server was not asked yet": {[]attest.Attestor{byUID{}}, true, codes.Unavailable},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s := newSystem(t, func(c *Config) { c.JWT, c.Attestors = &minter{}, tt.attestors })
				e := entry("e1", "/one", 1000)
				if tt.restored {
					s.cache.Restore([]*cache.Entry{e}, []*cache.SVID{s.ca.svid(t, e, time.Hour)}, nil)
				} else {
					s.add(e, entry("e2", "/two", 1001))
				}
				_, err := s.client(1000).FetchJWTSVID(withHeader(t.Context()),
					&workloadpb.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "spiffe://example.org/two"})
				if got := status.Code(err); got != tt.want {
					t.Errorf("got %v (%v), want %v", got, err, tt.want)
				}
			})
		})
	}
}

// Restored SVIDs are served before the first entry sync. Other callers do not get
// PermissionDenied.
func TestRestoredSVIDsAreServedBeforeTheFirstSync(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, nil)
		e := entry("e1", "/one", 1000)
		s.cache.Restore([]*cache.Entry{e}, []*cache.SVID{s.ca.svid(t, e, time.Hour)}, nil)
		if s.cache.Ready() {
			t.Error("ready before the first entry sync")
		}
		one(t, fetchX509(t.Context(), s.client(1000)))
		denied := fetchX509(t.Context(), s.client(1001))
		time.Sleep(startGrace)
		ended(t, denied, codes.Unavailable)
		waiting := fetchX509(t.Context(), s.client(1002))
		synctest.Wait()
		e2 := entry("e2", "/two", 1002)
		s.add(e2) // the first entry sync
		one(t, waiting)
		ended(t, fetchX509(t.Context(), s.client(1001)), codes.PermissionDenied)
	})
}
