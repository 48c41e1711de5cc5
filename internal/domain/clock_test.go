package domain_test

import (
	"crypto/tls"
	"sync/atomic"
	"testing"
	"time"
)

// TestProofAfterClockSteps: the clock is two days off for a moment in which somebody
// asks; then every port proves the server with a certificate that is valid.
func TestProofAfterClockSteps(t *testing.T) {
	t.Parallel()
	c := newConfig(t, "default")
	base := time.Now()
	var off atomic.Int64
	c.Now = func() time.Time { return base.Add(time.Duration(off.Load())) }
	r := run(t, c)
	ports := []string{"bundle_endpoint.address", "operators.address", "deployments.default.listen_address"}
	for _, step := range []time.Duration{0, 48 * time.Hour, time.Minute, -48 * time.Hour, 2 * time.Minute} {
		off.Store(int64(step))
		for _, port := range ports {
			conn, err := tls.Dial("tcp", r.address(port), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
			check(t, err)
			leaf := conn.ConnectionState().PeerCertificates[0]
			conn.Close()
			if now := c.Now(); now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
				t.Errorf("%v off: certificate of %s is valid from %v to %v, it is %v", step, port, leaf.NotBefore, leaf.NotAfter, now)
			}
		}
	}
}
