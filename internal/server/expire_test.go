package server_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/test/bufconn"

	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// TestExpiredEntry: a running server deletes an entry within a minute after its end.
func TestExpiredEntry(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := run(t, server.Config{TrustDomain: td, Deployments: []server.DeploymentConfig{{Name: "default", Listener: bufconn.Listen(1 << 16)}}})
		s := r.Server("default")
		_, err := s.UpsertEntry(t.Context(), spireapi.Entry{
			ID: "web", SPIFFEID: spiffeid.RequireFromPath(td, "/web"), Selectors: []spireapi.Selector{{Type: "unix", Value: "uid:0"}},
			ExpiresAt: time.Now().Add(time.Hour),
		})
		check(t, err)
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := len(s.Entries()); n != 1 {
			t.Errorf("before its end: %d entries", n)
		}
		time.Sleep(time.Minute + time.Second)
		synctest.Wait()
		if n := len(s.Entries()); n != 0 {
			t.Errorf("after its end: %d entries", n)
		}
		r.stop()
	})
}
