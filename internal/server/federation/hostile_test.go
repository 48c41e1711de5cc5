package federation_test

import (
	"crypto/ecdsa"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/server/federation"
)

// TestBadAnswers: a bad answer does not change the bundle and costs no more than half a
// minute and a mebibyte. The next good answer is accepted.
func TestBadAnswers(t *testing.T) {
	text := func(s string) http.HandlerFunc {
		return func(rw http.ResponseWriter, _ *http.Request) { fmt.Fprint(rw, s) }
	}
	drip := func(rw http.ResponseWriter, r *http.Request, part string, pause time.Duration) {
		for r.Context().Err() == nil {
			if _, err := rw.Write([]byte(part)); err != nil {
				return
			}
			rw.(http.Flusher).Flush()
			if pause > 0 {
				time.Sleep(pause)
			}
		}
	}
	key := func(fields string) string { return `{"keys":[{` + fields + `}]}` }
	for _, tt := range []struct {
		name    string
		answer  http.HandlerFunc
		outcome string
		why     string
	}{
		{"endless", func(rw http.ResponseWriter, r *http.Request) { drip(rw, r, strings.Repeat(" ", 1<<16), 0) }, "rejected", "larger than 1048576 bytes"},
		{"as long as it says", func(rw http.ResponseWriter, r *http.Request) {
			rw.Header().Set("Content-Length", "1000000000000")
			drip(rw, r, strings.Repeat("[", 1<<16), 0)
		}, "rejected", "larger than"},
		{"slow", func(rw http.ResponseWriter, r *http.Request) { drip(rw, r, " ", time.Second) }, "failed", "read the answer: context deadline exceeded"},
		{"silent", func(rw http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "failed", "deadline exceeded"},
		{"a long header", func(rw http.ResponseWriter, r *http.Request) {
			rw.Header().Set("X-Long", strings.Repeat("x", 1<<17))
			rw.Write([]byte("{}"))
		}, "failed", "header"},
		{"cut off", func(rw http.ResponseWriter, _ *http.Request) {
			rw.Header().Set("Content-Length", "1000")
			fmt.Fprint(rw, `{"keys":[]`)
			rw.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}, "failed", "unexpected EOF"},
		{"not found", http.NotFound, "failed", "status 404"},
		{"an error with a bundle", func(rw http.ResponseWriter, _ *http.Request) {
			rw.WriteHeader(http.StatusInternalServerError)
			rw.Write([]byte(`{"keys":[]}`))
		}, "failed", "status 500"},
		{"a part", func(rw http.ResponseWriter, _ *http.Request) {
			rw.WriteHeader(http.StatusPartialContent)
			rw.Write([]byte(`{"keys":[]}`))
		}, "failed", "status 206"},
		{"empty", text(""), "rejected", "not a bundle"},
		{"HTML", text("<html>captive portal</html>"), "rejected", "not a bundle"},
		{"JSON of another kind", text(`{"status":"ok"}`), "rejected", `no \"keys\"`},
		{"null", text(`null`), "rejected", `no \"keys\"`},
		{"not a list", text(`{"keys":{}}`), "rejected", "not a bundle"},
		{"invalid key", text(`{"keys":[1]}`), "rejected", "it is not a key"},
		{"invalid number", text(`{"keys":[],"spiffe_sequence":-1}`), "rejected", "sequence"},
		{"no certificate", text(key(`"use":"x509-svid","kty":"EC","crv":"P-256","x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"`)), "rejected", "0 certificates"},
		{"invalid certificate", text(key(`"use":"x509-svid","kty":"EC","crv":"P-256","x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM","x5c":["AAAA"]`)), "rejected", "x5c"},
		{"a redirect to http", redirect("http://partner.example/"), "failed", "not an https URL"},
		{"a redirect with a user", redirect("https://me:secret@partner.example/"), "failed", "has a user"},
		{"a redirect to itself", redirect("https://partner.example/"), "failed", "more than 3 redirects"},
		{"a redirect elsewhere", redirect("https://elsewhere.example/"), "failed", "elsewhere.example"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				answer := http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { rw.Write(document(partner, 1, w.web.cert)) })
				good := answer
				cert := w.web.certificate("partner.example")
				down := w.handle("partner.example:443", cert, func(rw http.ResponseWriter, r *http.Request) { answer(rw, r) })
				// A server without a certificate for this host.
				w.handle("elsewhere.example:443", cert, good)
				follow := federation.Endpoint{TrustDomain: partner, URL: "https://partner.example", Profile: federation.ProfileWeb}
				w.start(follow)
				w.holds(partner, w.web.cert)
				w.logged("changed")
				w.observed()
				down()

				answer = tt.answer
				down = w.handle("partner.example:443", cert, answer)
				// The next refresh begins within 5.5 min, and ends in 30 s more.
				time.Sleep(6 * time.Minute)
				synctest.Wait()
				if got := w.observed(); !strings.HasPrefix(got, tt.outcome) || strings.Contains(got, "applied") || strings.Contains(got, "unchanged") {
					t.Errorf("outcomes %q, want %s", got, tt.outcome)
				}
				w.holds(partner, w.web.cert)
				w.logged("level=WARN|federated bundle refresh failed, keeping the current bundle|" + tt.why)
				down()

				w.handle("partner.example:443", cert, good)
				time.Sleep(10 * time.Minute)
				synctest.Wait()
				w.holds(partner, w.web.cert)
				w.logged("federated bundle refresh recovered")
			})
		})
	}
}

func redirect(to string) http.HandlerFunc {
	return func(rw http.ResponseWriter, r *http.Request) { http.Redirect(rw, r, to, http.StatusTemporaryRedirect) }
}

// TestWrongCertificate: a server that is not the endpoint is rejected.
func TestWrongCertificate(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		serve func(w *world, p *domain)
		web   bool
		why   string
	}{
		{name: "of another authority of the same name", serve: func(w *world, p *domain) {
			w.handle("partner.example:443", w.domain(partner).certificate, nil)
		}, why: "unknown authority"},
		{name: "of another SPIFFE ID", serve: func(w *world, p *domain) {
			w.handle("partner.example:443", func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return p.as("/workload") }, nil)
		}, why: "unexpected ID"},
		{name: "of the web", serve: func(w *world, p *domain) {
			w.handle("partner.example:443", w.web.certificate("partner.example"), nil)
		}, why: "certificate contains no URI"},
		{name: "redirect to another SPIFFE ID", serve: func(w *world, p *domain) {
			w.handle("partner.example:443", p.certificate, redirect("https://cdn.example"))
			w.handle("cdn.example:443", func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return p.as("/cdn") }, nil)
		}, why: "unexpected ID"},
		{name: "of another host", web: true, serve: func(w *world, p *domain) {
			w.handle("partner.example:443", w.web.certificate("other.example"), nil)
		}, why: "is valid for other.example"},
		{name: "of another authority of the web", web: true, serve: func(w *world, p *domain) {
			w.handle("partner.example:443", newAuthority(w.t).certificate("partner.example"), nil)
		}, why: "unknown authority"},
		{name: "an SVID on the web", web: true, serve: func(w *world, p *domain) {
			w.handle("partner.example:443", p.certificate, nil)
		}, why: "its certificate is of spiffe://partner.example/spire/server: is its profile https_spiffe?"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				p := w.domain(partner)
				tt.serve(w, p)
				follow := p.follow()
				first := p.certificates()
				if tt.web {
					follow.Profile, follow.ID = federation.ProfileWeb, spiffeid.ID{}
				}
				w.start(follow)
				time.Sleep(time.Minute)
				synctest.Wait()
				w.holds(partner, first...)
				w.logged("read from its file", "refresh failed|"+tt.why)
				if got := w.observed(); !strings.HasPrefix(got, "failed failed") {
					t.Errorf("outcomes %s", got)
				}
			})
		})
	}
}

// TestRedirect: a redirect is followed if the new place authenticates as the endpoint. The
// next fetch starts at the old place.
func TestRedirect(t *testing.T) {
	t.Parallel()
	for _, profile := range []string{federation.ProfileWeb, federation.ProfileSPIFFE} {
		t.Run(profile, func(t *testing.T) {
			inWorld(t, func(w *world) {
				p := w.domain(partner)
				follow := p.follow()
				cert, cdn := p.certificate, p.certificate
				if profile == federation.ProfileWeb {
					cert, cdn = w.web.certificate("partner.example"), w.web.certificate("cdn.example")
					follow.Profile, follow.ID, follow.BundleFile = profile, spiffeid.ID{}, ""
				}
				w.handle("partner.example:443", cert, func(rw http.ResponseWriter, r *http.Request) {
					if !r.Close {
						w.t.Error("the connection stays open, and would not be verified again")
					}
					http.Redirect(rw, r, "https://cdn.example/b", http.StatusMovedPermanently)
				})
				w.handle("cdn.example:443", cdn, func(rw http.ResponseWriter, r *http.Request) { rw.Write(document(partner, 7, p.certificates()...)) })
				w.start(follow)
				w.holds(partner, p.certificates()...)
				time.Sleep(6 * time.Minute)
				synctest.Wait()
				if got := w.observed(); got != "applied unchanged" {
					t.Errorf("outcomes %s", got)
				}
				var asked []string
				for _, d := range w.dials {
					asked = append(asked, d.address)
				}
				if got := strings.Join(asked, " "); got != "partner.example:443 cdn.example:443 partner.example:443 cdn.example:443" {
					t.Errorf("asked %s", got)
				}
			})
		})
	}
}

// TestUnusableAuthorities: authorities that cannot be used, of an unknown kind (SPIFFE
// Trust Domain and Bundle, section 4.2) or invalid, are left out, and the others are used.
// The log has one line when that changes or at a restart, and LeftOut returns the number.
func TestUnusableAuthorities(t *testing.T) {
	inWorld(t, func(w *world) {
		junk := []string{
			`{"use":"x509-svid","kty":"XYZ"}`, `{"use":"jwt-svid","kid":"a","kty":"OKP","crv":"X448","x":"AAAA"}`,
			`{"use":"wit-svid","kty":"XYZ"}`, `{"kty":"EC"}`, `{"use":"jwt-svid","kid":"b","kty":"oct","k":"AAAA"}`,
		}
		var parts atomic.Pointer[[]string]
		parts.Store(&junk)
		known := strings.TrimSuffix(strings.TrimPrefix(string(document(partner, 3, w.web.cert)), `{"keys":[`), `],"spiffe_sequence":3}`)
		w.handle("partner.example:443", w.web.certificate("partner.example"), func(rw http.ResponseWriter, _ *http.Request) {
			fmt.Fprintf(rw, `{"more":true,"spiffe_sequence":3,"keys":[%s]}`, strings.Join(append(slices.Clone(*parts.Load()), known, known), ","))
		})
		follow := federation.Endpoint{TrustDomain: partner, URL: "https://partner.example", Profile: federation.ProfileWeb}
		w.start(follow)
		w.holds(partner, w.web.cert)
		if n := len(w.held(partner).JWTAuthorities()); n != 0 {
			t.Errorf("%d JWT authorities", n)
		}
		w.logged("level=WARN|unusable authorities left out|trust_domain=partner.example left_out=5|jwt:b: it is not a public key", "changed")
		if n := w.follower.LeftOut()[partner]; n != 5 {
			t.Errorf("%d left out", n)
		}
		time.Sleep(time.Hour)
		w.logged()
		fewer, none := junk[:2], []string{}
		parts.Store(&fewer)
		time.Sleep(6 * time.Minute)
		w.logged("unusable authorities left out|left_out=2")
		w.start(follow)
		w.logged("unusable authorities left out|left_out=2")
		parts.Store(&none)
		time.Sleep(6 * time.Minute)
		w.logged("no authority left out of the bundle")
		if n := w.follower.LeftOut()[partner]; n != 0 || !strings.HasPrefix(w.observed(), "applied unchanged") {
			t.Errorf("%d left out", n)
		}
	})
}

func TestCheck(t *testing.T) {
	t.Parallel()
	id := func(td spiffeid.TrustDomain) spiffeid.ID { return spiffeid.RequireFromPath(td, "/endpoint") }
	web := func(td spiffeid.TrustDomain) federation.Endpoint {
		return federation.Endpoint{TrustDomain: td, URL: "https://h:8443/x?y#z", Profile: federation.ProfileWeb}
	}
	by := func(td, of spiffeid.TrustDomain, file string) federation.Endpoint {
		return federation.Endpoint{TrustDomain: td, URL: "https://h", Profile: federation.ProfileSPIFFE, ID: id(of), BundleFile: file}
	}
	third := spiffeid.RequireTrustDomainFromString("third.example")
	for _, tt := range []struct {
		name      string
		endpoints []federation.Endpoint
		want      string // field of the only error
	}{
		{"none", nil, ""},
		{"web", []federation.Endpoint{web(partner), web(other)}, ""},
		{"its own endpoint", []federation.Endpoint{by(partner, partner, "f")}, ""},
		{"the server's", []federation.Endpoint{by(partner, own, "")}, ""},
		{"by one on the web", []federation.Endpoint{by(partner, other, ""), web(other)}, ""},
		{"by one by one with a file", []federation.Endpoint{by(partner, other, ""), by(other, third, ""), by(third, third, "f")}, ""},
		{"a cycle with a file", []federation.Endpoint{by(partner, other, ""), by(other, partner, "f")}, ""},
		{"no file", []federation.Endpoint{by(partner, partner, "")}, "bundle_file"},
		{"by one that is not configured", []federation.Endpoint{by(partner, other, "f")}, "endpoint_spiffe_id"},
		{"twice", []federation.Endpoint{web(partner), web(partner)}, "endpoint_url"},
		{"the server itself", []federation.Endpoint{web(own)}, "endpoint_url"},
	} {
		err := federation.Check(own, tt.endpoints)
		wrong, ok := errors.AsType[*federation.EndpointError](err)
		if tt.want == "" && err != nil || tt.want != "" && (!ok || wrong.Field != tt.want || wrong.TrustDomain != tt.endpoints[0].TrustDomain) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	err := federation.Check(own, []federation.Endpoint{by(partner, other, ""), by(other, partner, "")})
	if err == nil || strings.Count(err.Error(), "is not available") != 2 {
		t.Errorf("a cycle: %v", err)
	}
}

// FuzzAnswer: no answer causes a panic, and a bundle that is accepted can be stored,
// loaded and given to agents.
func FuzzAnswer(f *testing.F) {
	cert := newAuthority(&testing.T{}).cert
	f.Add(string(document(partner, 7, cert)))
	f.Add(`{"keys":[{"use":"x509-svid","kty":"XYZ"}],"spiffe_sequence":18446744073709551615,"spiffe_refresh_hint":-1}`)
	f.Add(`{"keys":[]}`)
	f.Add(`{"keys":[{"use":"jwt-svid","kid":"a","kty":"RSA","n":"AQAB","e":"AQAB"}]}`)
	f.Fuzz(func(t *testing.T, text string) {
		b, _, err := federation.Parse(partner, []byte(text))
		if err != nil {
			return
		}
		if hint, _ := b.RefreshHint(); hint < 0 || hint > 366*24*time.Hour {
			t.Errorf("refresh hint %v", hint)
		}
		data, err := federation.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		again, left, err := federation.Parse(partner, data)
		if err != nil || len(left) > 0 || !again.Equal(b) {
			t.Fatalf("stored as %s: %v", data, err)
		}
		checkAgentBundle(t, b)
	})
}

// checkAgentBundle checks that an agent accepts a bundle.
func checkAgentBundle(t *testing.T, b *spiffebundle.Bundle) {
	var c bundle.Content
	for _, cert := range b.X509Authorities() {
		c.X509 = append(c.X509, bundle.X509Authority{Certificate: cert})
	}
	for id, key := range b.JWTAuthorities() {
		if _, private := key.(*ecdsa.PrivateKey); private {
			t.Error("a private key")
		}
		c.JWT = append(c.JWT, bundle.JWTAuthority{KeyID: id, PublicKey: key})
	}
	if _, err := bundle.New(partner, c); err != nil && len(c.X509) > 0 {
		t.Errorf("agents: %v", err)
	}
}
