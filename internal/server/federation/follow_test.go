package federation_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/server/federation"
	"github.com/renewd/renewd/internal/server/keyset"
)

func writeFile(path string, data []byte) error { return os.WriteFile(path, data, 0o600) }

// TestRotation: the other side replaces its keys, twice. From the activation on its
// endpoint has a certificate of the new keyset. The follower gets every bundle, until the
// authority of the file is no longer trusted.
func TestRotation(t *testing.T) {
	inWorld(t, func(w *world) {
		p := w.domain(partner)
		p.up()
		first := p.certificates()
		w.start(p.follow())
		w.holds(partner, first...)
		w.logged("federated bundle read from its file|trust_domain=partner.example", "federated bundle changed|sequence=1|jwt_authorities=1|added=|jwt:")
		for range 2 {
			old := p.Active()
			step := func(mutate func() error) {
				w.t.Helper()
				w.check(mutate())
				time.Sleep(minInterval)
				synctest.Wait()
				w.holds(partner, p.certificates()...)
				if got, want := len(w.held(partner).JWTAuthorities()), len(p.Bundle().JWT); got != want {
					w.t.Errorf("%d JWT authorities, want %d", got, want)
				}
			}
			var next keyset.Keyset
			step(func() (err error) { next, err = p.Prepare(w.t.Context()); return err })
			w.logged("federated bundle changed|sequence=|x509_authorities=2|added=|x509:" + next.X509AuthorityID + "|removed=[]")
			step(func() error { return p.Activate(w.t.Context(), next.ID) })
			w.logged() // an activation does not change the bundle
			step(func() error { return p.Taint(w.t.Context(), old.ID) })
			w.logged("federated bundle changed|added=[]|removed=[]") // only the sequence number changes
			step(func() error { return p.Remove(w.t.Context(), old.ID) })
			w.logged("federated bundle changed|x509_authorities=1|added=[]|removed=|x509:" + old.X509AuthorityID)
		}
		if w.held(partner).HasX509Authority(first[0]) {
			w.t.Error("the first authority is still trusted")
		}
		if got := w.observed(); strings.Contains(got, "failed") || strings.Contains(got, "rejected") {
			w.t.Errorf("outcomes %s", got)
		}
		// The file has not changed, so it does not restore the removed authority.
		w.start(federation.Endpoint{TrustDomain: partner, URL: "https://partner.example", Profile: federation.ProfileSPIFFE, ID: p.id(), BundleFile: firstFile(w, first)})
		w.holds(partner, p.certificates()...)
		w.logged()
	})
}

// firstFile writes certificates in SPIFFE's format, with a higher number than any answer.
func firstFile(w *world, certs []*x509.Certificate) string {
	path := w.t.TempDir() + "/bundle.json"
	w.check(writeFile(path, document(partner, 99, certs...)))
	return path
}

// TestMissedRotation: after a rotation that was missed completely the endpoint's
// certificate does not verify. A new file continues from there.
func TestMissedRotation(t *testing.T) {
	inWorld(t, func(w *world) {
		p := w.domain(partner)
		p.up()
		first, follow := p.certificates(), p.follow()
		w.start(follow)
		w.stop()
		p.rotate()
		w.logged("read from its file", "changed")
		w.start(follow)
		time.Sleep(time.Hour)
		w.holds(partner, first...)
		w.logged("federated bundle refresh failed, keeping the current bundle|certificate signed by unknown authority")
		follow.BundleFile = p.file()
		w.start(follow)
		w.holds(partner, p.certificates()...)
		w.logged("read from its file", "federated bundle changed")
	})
}

// TestOutage: while the endpoint is down its bundle stays, also after a restart. The
// pauses between the fetches grow, and the log has one line at the first failure, one an
// hour while it lasts, and one at the recovery.
func TestOutage(t *testing.T) {
	inWorld(t, func(w *world) {
		p := w.domain(partner)
		p.hint = 40 * time.Minute
		p.up()
		w.start(p.follow())
		at := time.Now()
		p.down()
		w.logged("file", "changed")
		w.mu.Lock()
		w.dials = nil
		w.mu.Unlock()
		time.Sleep(3 * time.Hour)
		w.holds(partner, p.certificates()...)
		const failed = "level=WARN|federated bundle refresh failed, keeping the current bundle|trust_domain=partner.example|connection refused"
		w.logged(failed, failed+"|count=", failed+"|count=")
		if got := w.follower.Refreshed()[partner]; !got.Equal(at) {
			w.t.Errorf("refreshed at %v, want %v", got, at)
		}
		w.mu.Lock()
		dials := w.dials
		w.mu.Unlock()
		// 10 s, 20 s, ... up to 5 min, each ±50 %. Without an outage it is asked every 10 min.
		if n := len(dials); n < 25 || n > 75 {
			w.t.Errorf("asked %d times in 3 h", n)
		}
		if first := dials[1].at.Sub(dials[0].at); first < 5*time.Second || first > 15*time.Second {
			w.t.Errorf("the first pause was %v", first)
		}
		for i := 8; i < len(dials); i++ {
			if pause := dials[i].at.Sub(dials[i-1].at); pause < 150*time.Second || pause > 450*time.Second {
				w.t.Errorf("pause %d was %v", i, pause)
			}
		}
		w.start(p.follow())
		w.holds(partner, p.certificates()...)
		if got := w.follower.Refreshed()[partner]; !got.Equal(at) {
			w.t.Errorf("after a restart refreshed at %v, want %v", got, at)
		}
		w.logged("refresh failed")
		p.up()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		w.logged("level=INFO|federated bundle refresh recovered|partner.example|duration=")
		if got := w.observed(); !strings.HasPrefix(got, "applied failed failed") || !strings.Contains(got, "failed unchanged") {
			w.t.Errorf("outcomes %s", got)
		}
	})
}

// TestInterval: the refresh hint sets the interval, within limits: a bundle is asked for
// four times in the time of its hint, as SPIRE does.
func TestInterval(t *testing.T) {
	for _, tt := range []struct {
		hint string
		want time.Duration
	}{
		{`,"spiffe_refresh_hint":600`, 150 * time.Second},
		{`,"spiffe_refresh_hint":1`, 15 * time.Second},
		{`,"spiffe_refresh_hint":-7`, 5 * time.Minute},
		{`,"spiffe_refresh_hint":0`, 5 * time.Minute},
		{``, 5 * time.Minute},
		{`,"spiffe_refresh_hint":9223372036854775807`, 24 * time.Hour},
	} {
		t.Run(tt.hint, func(t *testing.T) {
			inWorld(t, func(w *world) {
				w.handle("partner.example:443", w.web.certificate("partner.example"), func(rw http.ResponseWriter, _ *http.Request) {
					fmt.Fprintf(rw, `%s%s}`, strings.TrimSuffix(string(document(partner, 1, w.web.cert)), "}"), tt.hint)
				})
				w.start(federation.Endpoint{TrustDomain: partner, URL: "https://partner.example", Profile: federation.ProfileWeb})
				w.holds(partner, w.web.cert)
				time.Sleep(20 * tt.want)
				w.mu.Lock()
				defer w.mu.Unlock()
				if len(w.dials) < 18 {
					w.t.Fatalf("asked %d times in %v", len(w.dials), 20*tt.want)
				}
				different := false
				for i := 1; i < len(w.dials); i++ {
					pause := w.dials[i].at.Sub(w.dials[i-1].at)
					if pause < tt.want*9/10 || pause > tt.want*11/10 {
						w.t.Errorf("pause %v, want about %v", pause, tt.want)
					}
					different = different || i > 1 && pause != w.dials[i-1].at.Sub(w.dials[i-2].at)
				}
				if !different {
					w.t.Error("all pauses are the same")
				}
			})
		})
	}
}

// TestOlderBundle: an answer with a lower number comes from a lagging replica, and is
// accepted only if it stays. An answer without a number is never older.
func TestOlderBundle(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := newAuthority(w.t).cert, newAuthority(w.t).cert
		var answer atomic.Pointer[[]byte]
		set := func(doc []byte) {
			doc = append(doc[:len(doc)-1], `,"spiffe_refresh_hint":60}`...)
			answer.Store(&doc)
		}
		w.handle("partner.example:443", w.web.certificate("partner.example"), func(rw http.ResponseWriter, _ *http.Request) { rw.Write(*answer.Load()) })
		set(document(partner, 5, a, b))
		w.start(federation.Endpoint{TrustDomain: partner, URL: "https://partner.example", Profile: federation.ProfileWeb})
		w.holds(partner, a, b)
		w.logged("changed")
		pass := func(d time.Duration) {
			time.Sleep(d)
			synctest.Wait()
		}
		set(document(partner, 4, a))
		pass(9 * time.Minute)
		w.holds(partner, a, b)
		w.logged("level=WARN|older federated bundle rejected, keeping the newer one|sequence=4 held=5")
		set(document(partner, 6, b))
		pass(2 * time.Minute)
		w.holds(partner, b)
		w.logged("federated bundle changed|sequence=6")
		set(document(partner, 3, a)) // the time limit starts again
		pass(9 * time.Minute)
		w.holds(partner, b)
		w.logged("keeping the newer one")
		pass(5 * time.Minute)
		w.holds(partner, a)
		w.logged("level=WARN|older federated bundle accepted|sequence=3 held=6", "changed")
		noNumber := strings.Replace(string(document(partner, 3, b)), `,"spiffe_sequence":3`, "", 1)
		set([]byte(noNumber))
		pass(minInterval)
		w.holds(partner, b)
		if got := w.observed(); !strings.Contains(got, "rejected rejected") {
			w.t.Errorf("outcomes %s", got)
		}
	})
}

// TestOlderBundleAroundOutage: time without answers says nothing about the replica, so it
// does not count.
func TestOlderBundleAroundOutage(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := newAuthority(w.t).cert, newAuthority(w.t).cert
		var answer atomic.Pointer[[]byte]
		pass := func(doc []byte, d time.Duration) {
			answer.Store(&doc)
			time.Sleep(d)
			synctest.Wait()
		}
		everyMinute := func(doc []byte) []byte { return append(doc[:len(doc)-1], `,"spiffe_refresh_hint":60}`...) }
		newer, older := everyMinute(document(partner, 5, a, b)), everyMinute(document(partner, 4, a))
		answer.Store(&newer)
		w.handle("partner.example:443", w.web.certificate("partner.example"), func(rw http.ResponseWriter, _ *http.Request) {
			if doc := *answer.Load(); doc != nil {
				rw.Write(doc)
				return
			}
			rw.WriteHeader(http.StatusServiceUnavailable)
		})
		w.start(federation.Endpoint{TrustDomain: partner, URL: "https://partner.example", Profile: federation.ProfileWeb})
		w.holds(partner, a, b)
		pass(older, 3*time.Minute)
		pass(nil, time.Hour)
		pass(older, 90*time.Second)
		w.holds(partner, a, b)
		pass(older, 10*time.Minute)
		w.holds(partner, a)
	})
}

// TestWithdrawn: a trust domain that publishes no keys has withdrawn them (SPIFFE Trust
// Domain and Bundle, section 4.1.3). Its bundle is no longer published, also after a
// restart.
func TestWithdrawn(t *testing.T) {
	inWorld(t, func(w *world) {
		var empty atomic.Bool
		w.handle("partner.example:443", w.web.certificate("partner.example"), func(rw http.ResponseWriter, _ *http.Request) {
			if empty.Load() {
				fmt.Fprint(rw, `{"keys":[]}`)
			} else {
				rw.Write(document(partner, 1, w.web.cert))
			}
		})
		follow := federation.Endpoint{TrustDomain: partner, URL: "https://partner.example", Profile: federation.ProfileWeb, BundleFile: firstFile(w, []*x509.Certificate{w.web.cert})}
		w.start(follow)
		w.holds(partner, w.web.cert)
		w.logged("file", "changed")
		empty.Store(true)
		time.Sleep(6 * time.Minute)
		synctest.Wait()
		if b := w.held(partner); b != nil {
			w.t.Errorf("published: %v", b)
		}
		w.logged("level=WARN|no X.509 authority left|removed=|" + authorityID(w.web.cert))
		w.start(follow)
		if b := w.held(partner); b != nil {
			w.t.Errorf("published after a restart: %v", b)
		}
		w.logged()
		empty.Store(false)
		time.Sleep(6 * time.Minute)
		synctest.Wait()
		w.holds(partner, w.web.cert)
	})
}

// TestEndpointsOfOthers: the SPIFFE ID of an endpoint is in another trust domain, which is
// configured, too, and replaces its keys. Another one is in the server's own.
func TestEndpointsOfOthers(t *testing.T) {
	inWorld(t, func(w *world) {
		p, o, self := w.domain(partner), w.domain(other), w.domain(own)
		p.up()
		p.serve(other, o.Bundle, p.certificate)
		follow := []federation.Endpoint{
			{TrustDomain: other, URL: "https://other.example", Profile: federation.ProfileSPIFFE, ID: p.id()},
			p.follow(),
		}
		w.start(follow...)
		time.Sleep(time.Second)
		synctest.Wait()
		w.holds(partner, p.certificates()...)
		w.holds(other, o.certificates()...)
		old := p.Active()
		next, err := p.Prepare(w.t.Context())
		w.check(err)
		time.Sleep(minInterval)
		w.check(p.Activate(w.t.Context(), next.ID))
		w.check(p.Taint(w.t.Context(), old.ID))
		w.check(p.Remove(w.t.Context(), old.ID))
		_, err = o.Prepare(w.t.Context())
		w.check(err)
		time.Sleep(minInterval)
		synctest.Wait()
		w.holds(partner, p.certificates()...)
		w.holds(other, o.certificates()...)
		p.down()

		w.stop()
		self.serve(other, o.Bundle, self.certificate)
		follower, err := federation.New(w.t.Context(), federation.Config{
			TrustDomain: own, Own: self.certificates, Storage: new(records), Publish: w.publish, Dial: w.dial,
			Endpoints: []federation.Endpoint{{TrustDomain: other, URL: "https://other.example", Profile: federation.ProfileSPIFFE, ID: self.id()}},
		})
		w.check(err)
		w.bundles = map[spiffeid.TrustDomain]*spiffebundle.Bundle{}
		ctx, stop := context.WithCancel(w.t.Context())
		done := make(chan error, 1)
		go func() { done <- follower.Run(ctx) }()
		time.Sleep(time.Second)
		synctest.Wait()
		w.holds(other, o.certificates()...)
		stop()
		w.check(<-done)
	})
}

// TestEndpointOfOneOnTheWeb: when the bundle that verifies an endpoint arrives, the
// endpoint is asked at once, without the pause after a failure.
func TestEndpointOfOneOnTheWeb(t *testing.T) {
	inWorld(t, func(w *world) {
		p, o := w.domain(partner), w.domain(other)
		w.handle("partner.example:443", w.web.certificate("partner.example"), func(rw http.ResponseWriter, _ *http.Request) {
			time.Sleep(time.Second)
			rw.Write(document(partner, 1, p.certificates()...))
		})
		p.serve(other, o.Bundle, p.certificate)
		w.start(
			federation.Endpoint{TrustDomain: other, URL: "https://other.example", Profile: federation.ProfileSPIFFE, ID: p.id()},
			federation.Endpoint{TrustDomain: partner, URL: "https://partner.example", Profile: federation.ProfileWeb},
		)
		w.holds(other)
		w.logged("there is none yet|trust_domain=other.example|no bundle of trust domain partner.example")
		time.Sleep(time.Second)
		synctest.Wait()
		w.holds(other, o.certificates()...)
	})
}

// TestNoLongerConfigured: the bundle of a trust domain that is no longer configured is
// deleted.
func TestNoLongerConfigured(t *testing.T) {
	inWorld(t, func(w *world) {
		p := w.domain(partner)
		w.start(p.follow()) // from the file: its endpoint is down
		w.holds(partner, p.certificates()...)
		w.logged("file", "refresh failed")
		if !w.follower.Follows(partner) || w.follower.Follows(other) || !w.follower.Refreshed()[partner].IsZero() {
			w.t.Error("Follows or Refreshed is wrong")
		}
		w.start()
		w.holds(partner)
		w.logged("level=WARN|federated bundle deleted|trust_domain=partner.example")
		if len(w.storage.records) != 0 {
			w.t.Error("its bundle is still stored")
		}
		w.start()
		w.logged()
	})
}

// TestStorageFails: if the storage fails, the newest bundle is published, and stored when
// the storage recovers. A stored bundle that cannot be read is fetched again.
func TestStorageFails(t *testing.T) {
	inWorld(t, func(w *world) {
		p := w.domain(partner)
		p.up()
		w.start(p.follow())
		w.logged("file", "changed")
		saved := w.storage.saved
		w.storage.fail(errors.New("disk full"))
		_, err := p.Prepare(w.t.Context())
		w.check(err)
		time.Sleep(10 * time.Minute)
		w.holds(partner, p.certificates()...)
		w.logged("changed", "level=WARN|federated bundle not stored|disk full")
		w.storage.fail(nil)
		time.Sleep(10 * time.Minute)
		w.logged("federated bundle storage recovered")
		if n := w.storage.saved - saved; n != 1 {
			w.t.Errorf("stored %d times", n)
		}
		p.down()
		w.start(p.follow())
		w.logged("file", "refresh failed") // this file has both keys
		w.stop()

		w.storage.records[0].Bundle = []byte("{")
		p.up()
		follow := p.follow()
		w.start(follow)
		w.holds(partner, p.certificates()...)
		w.logged("stored federated bundle cannot be used", "read from its file", "changed")
		w.stop()
		w.storage.fail(errors.New("damaged"))
		if err := w.open(follow); err == nil || !strings.Contains(err.Error(), "damaged") {
			w.t.Errorf("opened: %v", err)
		}
	})
}

// as issues a certificate for another path.
func (d *domain) as(path string) (*tls.Certificate, error) {
	key := newKey(d.w.t)
	svid, err := d.SignX509(spiffeid.RequireFromPath(d.td, path), key.Public(), time.Hour)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{svid.DER}, PrivateKey: key}, nil
}

// TestEndpointsOfEachOther: two endpoints are verified with each other's bundles and
// return a changed bundle each time. A bundle with the same X.509 authorities triggers no
// other fetch; any other triggers one at most once a minute.
func TestEndpointsOfEachOther(t *testing.T) {
	for name, tt := range map[string]struct {
		replaced bool // an authority in each answer
		limit    int64
	}{
		"sequence numbers only": {false, 6}, // at the start and every 5 minutes, each
		"authorities replaced":  {true, 28}, // and once a minute
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				a, b := w.domain(partner), w.domain(other)
				var requests atomic.Int64
				serve := func(of, verifier *domain) {
					w.handle(of.td.Name()+":443", verifier.certificate, func(rw http.ResponseWriter, _ *http.Request) {
						n := requests.Add(1)
						certs := of.certificates()
						if tt.replaced {
							certs = append(certs, newAuthority(t).cert)
						}
						if n > 10*tt.limit {
							n, certs = 10*tt.limit, of.certificates() // ends the loop of a follower without a limit
						}
						rw.Write(document(of.td, uint64(n), certs...))
					})
				}
				serve(a, b)
				serve(b, a)
				from := func(e federation.Endpoint, verifier *domain) federation.Endpoint {
					e.ID = verifier.id()
					return e
				}
				w.start(from(a.follow(), b), from(b.follow(), a))
				time.Sleep(10*time.Minute + 30*time.Second)
				synctest.Wait()
				if n := requests.Load(); n > tt.limit {
					t.Errorf("%d requests within 10m30s, want at most %d", n, tt.limit)
				}
			})
		})
	}
}
