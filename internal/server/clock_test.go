package server_test

import (
	"crypto/tls"
	"math"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/renewd/renewd/internal/server/rotation"
)

// TestCertificateAfterClockSteps: the clock is two days off during a handshake. At the
// next handshake every port shows a certificate that is valid by the present clock.
func TestCertificateAfterClockSteps(t *testing.T) {
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

// TestStartWithAWrongClock: the clock is days or years off at the start, as after an
// empty battery. The server shows that, and automatic rotation does nothing. After the
// clock is corrected nothing has changed.
func TestStartWithAWrongClock(t *testing.T) {
	t.Parallel()
	for name, far := range map[string]time.Duration{"ahead": 91 * day, "years ahead": 5 * 365 * day, "behind": -30 * 365 * day} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newConfig(t, "default")
			c.OperatorAddress, c.EndpointAddress = "", ""
			c.Rotation = rotation.Policy{}
			r := run(t, c)
			r.put("default", "web", "/web")
			workload := r.join("default").workload("web")
			first := r.keysets("default").GetKeysets()[0].GetId()
			r.stop()

			c.Now = shifted(far)
			r = run(t, c)
			if a := r.keysets("default").GetAutomatic(); !strings.HasPrefix(a.GetWaitsFor(), "the clock, which ") {
				t.Errorf("automatic rotation waits for %q", a.GetWaitsFor())
			}
			if doubt := clockDoubt(t, r); (doubt > 0) != (far > 0) || math.Abs(doubt) < far.Abs().Seconds()-3600 {
				t.Errorf("the metric says %v s for a clock that is %v off", doubt, far)
			}
			r.stop()

			c.Now = nil
			r = run(t, c)
			if all := r.keysets("default").GetKeysets(); len(all) != 1 || all[0].GetId() != first {
				t.Errorf("keysets are %v", all)
			}
			if a := r.keysets("default").GetAutomatic(); a.GetWaitsFor() != "" {
				t.Errorf("automatic rotation waits for %q", a.GetWaitsFor())
			}
			if doubt := clockDoubt(t, r); doubt != 0 {
				t.Errorf("the metric says %v s for a clock that is right", doubt)
			}
			trust := x509bundle.FromX509Authorities(td, r.Published().Certificates())
			if _, _, err := x509svid.Verify(workload.chain, trust); err != nil {
				t.Errorf("SVID signed before: %v", err)
			}
			cert, err := r.Server("default").Certificate()
			check(t, err)
			if _, _, err := x509svid.ParseAndVerify(cert.Certificate, trust); err != nil {
				t.Errorf("server certificate: %v", err)
			}
		})
	}
}

// clockDoubt reads the metric.
func clockDoubt(t *testing.T, r *running) float64 {
	t.Helper()
	shown := get(t, http.DefaultClient, "http://"+r.address("metrics.address")+"/metrics", http.StatusOK)
	line := regexp.MustCompile(`(?m)^renewd_server_clock_doubt_seconds (.+)$`).FindSubmatch(shown)
	if line == nil {
		t.Fatal("no metric of the clock")
	}
	v, err := strconv.ParseFloat(string(line[1]), 64)
	check(t, err)
	return v
}
