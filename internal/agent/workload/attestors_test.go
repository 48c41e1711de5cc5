package workload

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
)

// engine is an attestor of containers: each caller's has the label team=web and a secret in
// its environment.
type engine struct{ err error }

func (engine) Name() string { return "docker" }

func (e engine) Attest(context.Context, *attest.Peer) ([]cache.Selector, error) {
	if e.err != nil {
		return nil, e.err
	}
	return []cache.Selector{{Type: "docker", Value: "label:team:web"}, {Type: "docker", Value: "env:PASSWORD=hunter2"}}, nil
}

func entryFor(id, path string, selectors ...cache.Selector) *cache.Entry {
	return &cache.Entry{ID: id, SPIFFEID: spiffeid.RequireFromPath(td, path), Selectors: selectors, CreatedAt: time.Unix(1, 0)}
}

// A caller whose match may depend on an attestor that fails is not denied. Any other is.
func TestDeniedOnlyIfNoFailedAttestorMatters(t *testing.T) {
	t.Parallel()
	user := func(uid int) cache.Selector { return cache.Selector{Type: "unix", Value: fmt.Sprint("uid:", uid)} }
	web := cache.Selector{Type: "docker", Value: "label:team:web"}
	pod := cache.Selector{Type: "k8s", Value: "ns:web"}
	for name, tt := range map[string]struct {
		entry *cache.Entry
		want  codes.Code
	}{
		"selectors of the failed type alone":     {entryFor("e", "/x", web), codes.Unavailable},
		"with another that the caller has":       {entryFor("e", "/x", web, user(1001)), codes.Unavailable},
		"with another that the caller lacks":     {entryFor("e", "/x", web, user(1000)), codes.PermissionDenied},
		"with another of a type without failure": {entryFor("e", "/x", web, pod), codes.PermissionDenied},
		"no selector of the failed type":         {entryFor("e", "/x", user(1000)), codes.PermissionDenied},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s := newSystem(t, func(c *Config) {
					c.Attestors = append(c.Attestors, engine{errors.New("engine is down")})
					c.JWT = &minter{mint: func(context.Context, string, []string) (string, error) { return "", errors.New("down") }}
				})
				s.add(tt.entry)
				ended(t, fetchX509(t.Context(), s.client(1001)), tt.want)
				s.add(entryFor("own", "/own", user(1001)))
				one(t, fetchX509(t.Context(), s.client(1001)))
				// The same holds for one SPIFFE ID of a caller that has another.
				_, err := s.client(1001).FetchJWTSVID(withHeader(t.Context()), &workloadpb.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "spiffe://example.org/x"})
				if status.Code(err) != tt.want {
					t.Errorf("FetchJWTSVID: %v, want %v", err, tt.want)
				}
				if got := s.logs.attrs("caller attestation incomplete"); len(got) != 1 || got[0]["attestor"] != "docker" || got[0]["error"] != "engine is down" {
					t.Errorf("logged %v, want one line", got)
				}
				if n := s.obs.attested["docker engine is down"]; n < 3 || s.obs.attested["unix <nil>"] != n {
					t.Errorf("counted %v", s.obs.attested)
				}
			})
		})
	}
}

// The values of selectors are logged only if that is configured: they may be secrets.
func TestSelectorsInLog(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		prefixes []string
		want     string
	}{
		{nil, ""},
		{[]string{"unix"}, "unix:uid:1001"},
		{[]string{"un", "docker:la", "docker:label"}, "docker:label:team:web"},
		{[]string{"unix", "docker:env:PASSWORD=hunter2"}, "docker:env:PASSWORD=hunter2 unix:uid:1001"},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newSystem(t, func(c *Config) {
				c.Attestors = append(c.Attestors, engine{})
				c.LogSelectors = tt.prefixes
			})
			s.add(entryFor("e", "/x", cache.Selector{Type: "docker", Value: "label:team:db"}))
			ended(t, fetchX509(t.Context(), s.client(1001)), codes.PermissionDenied)
			got := s.logs.attrs("caller denied")
			if len(got) != 1 || got[0]["selector_types"] != "docker unix" || got[0]["selectors"] != tt.want {
				t.Errorf("with %q: logged %v, want %q", tt.prefixes, got, tt.want)
			}
		})
	}
}
