package workload

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
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

// hasher is an attestor that hashes the caller's program while an entry needs the
// hash, which is always "good".
type hasher struct {
	needed func() bool

	mu     sync.Mutex
	hashed int
	block  chan struct{} // hashing waits for it
	err    error         // of hashing
	others []string      // selectors that are always found, instead of the user
}

func (*hasher) Name() string { return "unix" }

func (h *hasher) Attest(ctx context.Context, p *attest.Peer) ([]cache.Selector, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	others := h.others
	if others == nil {
		others = []string{fmt.Sprintf("uid:%d", p.UID())}
	}
	var out []cache.Selector
	for _, value := range others {
		out = append(out, cache.Selector{Type: "unix", Value: value})
	}
	if !h.needed() {
		return out, nil
	}
	h.hashed++
	if block := h.block; block != nil {
		h.mu.Unlock()
		select {
		case <-block:
		case <-ctx.Done():
		}
		h.mu.Lock()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	if h.err == nil {
		out = append(out, cache.Selector{Type: "unix", Value: "sha256:good"})
	}
	return out, h.err
}

func newHasherSystem(t *testing.T) (*system, *hasher) {
	h := &hasher{}
	s := newSystem(t, func(c *Config) {
		c.Needs = func() uint64 { return c.Cache.Needs("unix", "sha256") }
		h.needed = func() bool { return c.Needs() != 0 }
		c.Attestors = []attest.Attestor{h}
		c.JWT = &minter{mint: func(context.Context, string, []string) (string, error) { return "", errors.New("down") }}
	})
	return s, h
}

// hashEntry returns an entry for the program with the hash, of any user.
func hashEntry(id, path, hash string) *cache.Entry {
	return &cache.Entry{ID: id, SPIFFEID: spiffeid.RequireFromPath(td, path), CreatedAt: time.Unix(1, 0),
		Selectors: []cache.Selector{{Type: "unix", Value: "sha256:" + hash}}}
}

// Nothing is hashed while no entry needs it. From the first entry that does, the
// callers of open streams are attested with the hash, and the streams go on.
func TestStreamsAreReattested(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, h := newHasherSystem(t)
		s.add(entry("e1", "/one", 1000))
		c := s.client(1000)
		ctx, cancel := context.WithCancel(t.Context())
		in := fetchX509(ctx, c)
		one(t, in)
		bundles := receive(c.FetchX509Bundles(withHeader(t.Context()), &workloadpb.X509BundlesRequest{}))
		if got := settled(bundles); len(got) != 1 {
			t.Errorf("bundles: got %v", got)
		}
		if h.hashed != 0 {
			t.Errorf("hashed %d times, and no entry needs it", h.hashed)
		}
		s.add(hashEntry("e2", "/two", "other"))
		time.Sleep(time.Second)
		noAnswer(t, in)
		if h.hashed != 2 {
			t.Errorf("hashed %d times, want once for each stream", h.hashed)
		}
		s.add(hashEntry("e3", "/three", "good"))
		time.Sleep(time.Second)
		got := settled(in)
		if len(got) == 0 || got[len(got)-1].err != nil ||
			!slices.Equal(ids(got[len(got)-1].msg), []string{"spiffe://example.org/one", "spiffe://example.org/three"}) {
			t.Errorf("got %v, want /one and /three", got)
		}
		// The hash is no longer needed, and then needed again.
		s.cache.Update(nil, []string{"e2", "e3"})
		s.add(entry("e4", "/four", 1001))
		s.add(hashEntry("e5", "/five", "good"))
		time.Sleep(time.Second)
		got = settled(in)
		if len(got) == 0 || got[len(got)-1].err != nil ||
			!slices.Equal(ids(got[len(got)-1].msg), []string{"spiffe://example.org/one", "spiffe://example.org/five"}) {
			t.Errorf("got %v, want /one and /five", got)
		}
		cancel()
		synctest.Wait()
		s.cache.Sweep(func(cache.Process) cache.Life { return cache.Ended })
		for _, u := range s.cache.Authorities() {
			if u.Streams != 0 {
				t.Errorf("%d streams are counted after all have ended", u.Streams)
			}
		}
	})
}

// A caller that connects while the agent starts has its hash by its first answer.
func TestCallersOfAStartingAgentAreReattested(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, _ := newHasherSystem(t)
		in := fetchX509(t.Context(), s.client(1000))
		time.Sleep(startGrace / 2)
		noAnswer(t, in)
		s.add(hashEntry("e1", "/one", "good"))
		if got := ids(one(t, in)); !slices.Equal(got, []string{"spiffe://example.org/one"}) {
			t.Errorf("got %v", got)
		}
	})
}

// A stream counts against the authority of its last answer until the next one, also
// while its caller is attested again.
func TestStreamCountsDuringReattestation(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, h := newHasherSystem(t)
		s.add(entry("e1", "/one", 1000))
		in := fetchX509(t.Context(), s.client(1000))
		one(t, in)
		h.block = make(chan struct{})
		s.add(hashEntry("e2", "/two", "good"))
		time.Sleep(time.Minute)
		noAnswer(t, in)
		if u := s.cache.Authorities(); len(u) != 1 || u[0].Streams != 1 {
			t.Errorf("got %+v, want one stream", u)
		}
		close(h.block)
		time.Sleep(reattestPause)
		one(t, in)
	})
}

// A delayed hash, such as on a hanging file system, does not delay the renewals of an
// open stream. With the hash the stream gets the identity of the new entry.
func TestStreamContinuesWhileItsHashIsDelayed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, h := newHasherSystem(t)
		s.add(entry("e1", "/one", 1000))
		c := s.client(1000)
		in := fetchX509(t.Context(), c)
		one(t, in)
		bundles := receive(c.FetchX509Bundles(withHeader(t.Context()), &workloadpb.X509BundlesRequest{}))
		one(t, bundles)
		block := make(chan struct{})
		h.mu.Lock()
		h.block = block
		h.mu.Unlock()
		s.add(hashEntry("e2", "/two", "good"))
		for range 10 {
			svid := s.put(entry("e1", "/one", 1000))
			time.Sleep(2*reattestWait + time.Second) // both streams wait for the same attestor
			got := settled(in)
			if len(got) != 1 || got[0].err != nil || !bytes.Equal(got[0].msg.GetSvids()[0].GetX509Svid(), svid.Leaf) {
				t.Fatalf("got %v, want the SVID that was renewed", got)
			}
		}
		noAnswer(t, bundles)
		close(block)
		time.Sleep(reattestPause + time.Second)
		got := settled(in)
		if len(got) != 1 || got[0].err != nil || !slices.Equal(ids(got[0].msg), []string{"spiffe://example.org/one", "spiffe://example.org/two"}) {
			t.Errorf("got %v, want /one and /two", got)
		}
		noAnswer(t, bundles)
	})
}

// While the hash is delayed, a stream does not end with PermissionDenied.
func TestStreamWithoutEntryWhileItsHashIsDelayed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, h := newHasherSystem(t)
		s.add(entry("e1", "/one", 1000))
		in := fetchX509(t.Context(), s.client(1000))
		one(t, in)
		block := make(chan struct{})
		defer close(block)
		h.mu.Lock()
		h.block = block
		h.mu.Unlock()
		s.add(hashEntry("e2", "/two", "good"))
		s.cache.Update(nil, []string{"e1"})
		time.Sleep(2 * reattestWait)
		ended(t, in, codes.Unavailable)
	})
}

// A stream that was opened while an attestor failed gets the identities that depend on it
// when the attestor has recovered.
func TestStreamIsCompleteAfterAnAttestorRecovers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, h := newHasherSystem(t)
		h.err = errors.New("no answer")
		s.add(entry("e1", "/one", 1000))
		s.add(hashEntry("e2", "/two", "good"))
		in := fetchX509(t.Context(), s.client(1000))
		if got := ids(one(t, in)); !slices.Equal(got, []string{"spiffe://example.org/one"}) {
			t.Fatalf("got %v", got)
		}
		time.Sleep(10 * time.Minute)
		noAnswer(t, in)
		h.mu.Lock()
		if h.hashed > 25 {
			t.Errorf("attested %d times in 10 minutes", h.hashed)
		}
		h.err = nil
		h.mu.Unlock()
		time.Sleep(reattestPause + time.Second)
		if got := ids(one(t, in)); !slices.Equal(got, []string{"spiffe://example.org/one", "spiffe://example.org/two"}) {
			t.Errorf("got %v, want /one and /two", got)
		}
		h.mu.Lock()
		before := h.hashed
		h.mu.Unlock()
		time.Sleep(10 * time.Minute)
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.hashed != before {
			t.Errorf("attested %d times after the attestation was complete", h.hashed-before)
		}
	})
}

// An open stream continues when its caller cannot be fully attested, and does not end
// with PermissionDenied.
func TestFailedReattestation(t *testing.T) {
	t.Parallel()
	for name, others := range map[string][]string{
		"the hash is missing":     nil,
		"the user is missing too": {"gid:1000"},
		"all is missing":          {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s, h := newHasherSystem(t)
				s.add(entry("e1", "/one", 1000))
				in := fetchX509(t.Context(), s.client(1000))
				one(t, in)
				h.mu.Lock()
				h.err, h.others = errors.New("may not be read"), others
				h.mu.Unlock()
				s.add(hashEntry("e2", "/two", "good"))
				time.Sleep(time.Second)
				noAnswer(t, in)
				s.put(entry("e1", "/one", 1000))
				time.Sleep(time.Second)
				one(t, in)
				s.cache.Update(nil, []string{"e1"})
				time.Sleep(time.Second)
				ended(t, in, codes.Unavailable)
			})
		})
	}
}

// While a selector that an entry could need is missing, a caller that another entry
// matches is served, and no caller gets PermissionDenied.
func TestIncompleteAttestation(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, h := newHasherSystem(t)
		h.err = errors.New("may not be read")
		s.add(entry("e1", "/one", 1000), hashEntry("e2", "/two", "good"))
		in := fetchX509(t.Context(), s.client(1000))
		if got := ids(one(t, in)); !slices.Equal(got, []string{"spiffe://example.org/one"}) {
			t.Errorf("got %v", got)
		}
		c, ctx := s.client(1001), withHeader(t.Context())
		ended(t, fetchX509(t.Context(), c), codes.Unavailable)
		ended(t, receive(c.FetchX509Bundles(ctx, &workloadpb.X509BundlesRequest{})), codes.Unavailable)
		ended(t, receive(c.FetchJWTBundles(ctx, &workloadpb.JWTBundlesRequest{})), codes.Unavailable)
		_, err := c.FetchJWTSVID(ctx, &workloadpb.JWTSVIDRequest{Audience: []string{"a"}})
		if status.Code(err) != codes.Unavailable {
			t.Errorf("FetchJWTSVID: %v", err)
		}
		_, err = s.client(1000).FetchJWTSVID(ctx, &workloadpb.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "spiffe://example.org/two"})
		if status.Code(err) != codes.Unavailable {
			t.Errorf("FetchJWTSVID of the ID that the hash gives: %v", err)
		}
		_, err = c.ValidateJWTSVID(ctx, &workloadpb.ValidateJWTSVIDRequest{Audience: "a", Svid: "x"})
		if status.Code(err) != codes.Unavailable {
			t.Errorf("ValidateJWTSVID: %v", err)
		}
		if got := s.logs.attrs("caller attestation incomplete"); len(got) != 2 || got[0]["attestor"] != "unix" || got[0]["error"] != "may not be read" {
			t.Errorf("logged %v, want once for each user", got)
		}
	})
}

// An entry may arrive between the attestation of a caller and its answer.
func TestNewEntryDuringAttestation(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, _ := newHasherSystem(t)
		s.add(entry("e1", "/one", 1000))
		c := caller{s: &Server{cfg: Config{Needs: func() uint64 { return s.cache.Needs("unix", "sha256") }}}}
		s.add(hashEntry("e2", "/two", "good"))
		v := s.cache.Match(nil)
		if err := c.authorize(&v); status.Code(err) != codes.Unavailable {
			t.Errorf("got %v, want Unavailable", err)
		}
	})
}
