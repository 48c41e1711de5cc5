package spireapi_test

import (
	"crypto/x509"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/renewd/renewd/internal/server/spireapi"
)

// TestServerCertificateAfterClockSteps: clients connect while the clock is days off.
// The certificate is valid by the clock of each handshake.
func TestServerCertificateAfterClockSteps(t *testing.T) {
	t.Parallel()
	base := time.Now()
	var off atomic.Int64
	now := func() time.Time { return base.Add(time.Duration(off.Load())) }
	s := newServer(t, spireapi.Config{Now: now})
	get := func() *x509.Certificate {
		t.Helper()
		c, err := s.Certificate()
		check(t, err)
		leaf, err := x509.ParseCertificate(c.Certificate[0])
		check(t, err)
		authorities := x509bundle.FromX509Authorities(td, s.Keysets().Bundle().Certificates())
		if _, _, err := x509svid.Verify([]*x509.Certificate{leaf}, authorities, x509svid.WithTime(now())); err != nil {
			t.Errorf("%v off: %v", time.Duration(off.Load()), err)
		}
		return leaf
	}
	for _, step := range []time.Duration{0, 48 * time.Hour, 0, time.Hour, 24 * time.Hour, 23 * time.Hour, 80 * 24 * time.Hour, time.Minute} {
		off.Store(int64(step))
		first := get()
		off.Add(int64(time.Hour))
		if !get().Equal(first) {
			t.Errorf("%v off: another certificate after an hour", step)
		}
	}
}
