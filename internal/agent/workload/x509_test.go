package workload

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os/exec"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
)

type x509Answers = <-chan answer[workloadpb.X509SVIDResponse]

func fetchX509(ctx context.Context, c workloadpb.SpiffeWorkloadAPIClient) x509Answers {
	return receive(c.FetchX509SVID(withHeader(ctx), &workloadpb.X509SVIDRequest{}))
}

// settled returns the answers that arrive until every goroutine in the bubble waits.
func settled[T any](in <-chan answer[T]) []answer[T] {
	synctest.Wait()
	var out []answer[T]
	for {
		select {
		case a, ok := <-in:
			if !ok {
				return out
			}
			out = append(out, a)
		default:
			return out
		}
	}
}

// one expects exactly one answer to have arrived.
func one[T any](t *testing.T, in <-chan answer[T]) *T {
	t.Helper()
	got := settled(in)
	if len(got) != 1 || got[0].err != nil {
		t.Fatalf("got %d answers (%v), want one", len(got), got)
	}
	return got[0].msg
}

// ended expects the stream to have ended with the code, and nothing else.
func ended[T any](t *testing.T, in <-chan answer[T], want codes.Code) {
	t.Helper()
	got := settled(in)
	if len(got) != 1 || status.Code(got[0].err) != want {
		t.Fatalf("got %v, want the end with %v", got, want)
	}
}

func noAnswer[T any](t *testing.T, in <-chan answer[T]) {
	t.Helper()
	if got := settled(in); len(got) != 0 {
		t.Fatalf("got %d answers (%v), want none", len(got), got)
	}
}

func ids(m *workloadpb.X509SVIDResponse) []string {
	var out []string
	for _, s := range m.Svids {
		out = append(out, s.SpiffeId)
	}
	return out
}

func TestX509AnswerIsComplete(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, nil)
		other := newAuthority(t, otherTD, "other")
		s.cache.SetBundle(&bundle.Snapshot{
			Own: bundleOf(t, td, 1, s.ca),
			Federated: map[spiffeid.TrustDomain]*bundle.Bundle{
				otherTD: bundleOf(t, otherTD, 1, other),
				spiffeid.RequireTrustDomainFromString("unrelated.example"): bundleOf(t, otherTD, 1, other),
			},
			NotFound: map[spiffeid.TrustDomain]bool{spiffeid.RequireTrustDomainFromString("unknown.example"): true},
		})
		e1, e2, e3 := entry("e1", "/one", 1000), entry("e2", "/two", 1000), entry("e3", "/three", 1001)
		e2.Hint = "second"
		e2.FederatesWith = []spiffeid.TrustDomain{otherTD, td, spiffeid.RequireTrustDomainFromString("unknown.example")}
		s.cache.Update([]*cache.Entry{e2, e3, e1}, nil)
		v2, v1 := s.put(e2), s.put(e1)
		s.put(e3)

		got := one(t, fetchX509(t.Context(), s.client(1000)))
		if want := []string{"spiffe://example.org/one", "spiffe://example.org/two"}; !slices.Equal(ids(got), want) {
			t.Fatalf("got %v, want %v in the order of entry IDs", ids(got), want)
		}
		for i, want := range []*cache.SVID{v1, v2} {
			g := got.Svids[i]
			if !bytes.Equal(g.X509Svid, want.Leaf) || !bytes.Equal(g.X509SvidKey, want.Key) || !bytes.Equal(g.Bundle, s.ca.cert.Raw) {
				t.Errorf("SVID %d is not what the cache holds", i)
			}
		}
		if got.Svids[0].Hint != "" || got.Svids[1].Hint != "second" {
			t.Errorf("hints are %q and %q", got.Svids[0].Hint, got.Svids[1].Hint)
		}
		if len(got.FederatedBundles) != 1 || !bytes.Equal(got.FederatedBundles[otherTD.IDString()], other.cert.Raw) {
			t.Errorf("federated bundles: %v", got.FederatedBundles)
		}
	})
}

func TestFirstAnswerWaitsUntilComplete(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, nil)
		e1, e2 := entry("e1", "/one", 1000), entry("e2", "/two", 1000)
		s.cache.Update([]*cache.Entry{e1, e2}, nil)
		in := fetchX509(t.Context(), s.client(1000))
		noAnswer(t, in)
		time.Sleep(time.Minute)
		s.put(e1)
		time.Sleep(partialGrace - time.Millisecond)
		noAnswer(t, in)
		s.put(e2)
		if got := one(t, in); len(got.Svids) != 2 {
			t.Errorf("got %v", ids(got))
		}
	})
}

// Of six identities one is available: after a while it is sent alone, and the others
// when they arrive.
func TestFirstAnswerDoesNotWaitForever(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, nil)
		var entries []*cache.Entry
		for i := range 6 {
			entries = append(entries, entry(fmt.Sprint("e", i), fmt.Sprint("/", i), 1000))
		}
		s.cache.Update(entries, nil)
		in := fetchX509(t.Context(), s.client(1000))
		s.put(entries[3])
		time.Sleep(partialGrace)
		if got := one(t, in); !slices.Equal(ids(got), []string{"spiffe://example.org/3"}) {
			t.Errorf("got %v, want the SVID that is cached", ids(got))
		}
		time.Sleep(time.Minute)
		s.put(entries[1])
		if got := one(t, in); len(got.Svids) != 2 {
			t.Errorf("got %v, want the SVIDs that have arrived", ids(got))
		}
	})
}

func TestFirstAnswerDoesNotWaitForWhatFailed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, nil)
		e1, e2 := entry("e1", "/one", 1000), entry("e2", "/two", 1000)
		s.cache.Update([]*cache.Entry{e1, e2}, nil)
		in := fetchX509(t.Context(), s.client(1000))
		s.put(e1)
		noAnswer(t, in)
		s.cache.Failed("e2")
		if got := one(t, in); len(got.Svids) != 1 {
			t.Errorf("got %v", ids(got))
		}
	})
}

// A renewal reaches a stream while a new entry still waits for the server.
func TestRenewalDoesNotWaitForNewEntry(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, nil)
		e1, e2 := entry("e1", "/one", 1000), entry("e2", "/two", 1000)
		s.add(e1)
		in := fetchX509(t.Context(), s.client(1000))
		one(t, in)
		s.cache.Update([]*cache.Entry{e2}, nil)
		time.Sleep(time.Minute)
		noAnswer(t, in)
		renewed := s.put(e1)
		time.Sleep(PushSpacing)
		if got := one(t, in); !bytes.Equal(got.Svids[0].X509Svid, renewed.Leaf) {
			t.Error("the renewed SVID was not sent")
		}
	})
}

func TestPushesAreCoalesced(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, nil)
		var all []*cache.Entry
		for i := range 40 {
			all = append(all, entry(fmt.Sprintf("e%02d", i), fmt.Sprintf("/w%d", i), 1000))
		}
		s.add(all...)
		start := time.Now()
		in := fetchX509(t.Context(), s.client(1000))
		// A wave: 20 renewals a second for 2 seconds.
		last := map[string][]byte{}
		for _, e := range all {
			time.Sleep(50 * time.Millisecond)
			last[e.SPIFFEID.String()] = s.put(e).Leaf
		}
		time.Sleep(PushSpacing)
		got := settled(in)
		if got[0].at != start {
			t.Errorf("the first answer took %v", got[0].at.Sub(start))
		}
		for i, a := range got[1:] {
			if d := a.at.Sub(got[i].at); d < PushSpacing {
				t.Errorf("answer %d came %v after the one before", i+1, d)
			}
			if len(a.msg.Svids) != len(all) {
				t.Errorf("answer %d has %d SVIDs, want the full set", i+1, len(a.msg.Svids))
			}
		}
		if len(got) < 8 || len(got) > 11 {
			t.Errorf("%d answers in 2 s, want about 4 a second", len(got))
		}
		for _, svid := range got[len(got)-1].msg.Svids {
			if !bytes.Equal(svid.X509Svid, last[svid.SpiffeId]) {
				t.Errorf("%s: the last state was not delivered", svid.SpiffeId)
			}
		}
	})
}

func TestNoPushWithoutChange(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, nil)
		e := entry("e1", "/one", 1000)
		s.add(e, entry("e2", "/other", 1001))
		ctx := withHeader(t.Context())
		c := s.client(1000)
		svids := fetchX509(t.Context(), c)
		x509s := receive(c.FetchX509Bundles(ctx, &workloadpb.X509BundlesRequest{}))
		jwts := receive(c.FetchJWTBundles(ctx, &workloadpb.JWTBundlesRequest{}))
		one(t, svids)
		one(t, x509s)
		one(t, jwts)

		again := bundleOf(t, td, 2, s.ca) // another sequence number, the same authorities
		s.cache.SetBundle(&bundle.Snapshot{Own: again})
		s.cache.Update([]*cache.Entry{entry("e3", "/third", 1001), {
			ID: e.ID, SPIFFEID: e.SPIFFEID, Selectors: e.Selectors, CreatedAt: e.CreatedAt, Revision: e.Revision,
		}}, nil)
		time.Sleep(time.Minute)
		noAnswer(t, svids)
		noAnswer(t, x509s)
		noAnswer(t, jwts)

		next := newAuthority(t, td, "b")
		s.cache.SetBundle(&bundle.Snapshot{Own: bundleOf(t, td, 3, s.ca, next)})
		both := slices.Concat(s.ca.cert.Raw, next.cert.Raw)
		if got := one(t, svids); !bytes.Equal(got.Svids[0].Bundle, both) {
			t.Error("X.509-SVID stream: the new authority is missing")
		}
		if got := one(t, x509s); !bytes.Equal(got.Bundles[td.IDString()], both) {
			t.Error("X.509 bundle stream: the new authority is missing")
		}
		if got := one(t, jwts); !bytes.Contains(got.Bundles[td.IDString()], []byte("jwt-b")) {
			t.Error("JWT bundle stream: the new key is missing")
		}
	})
}

func TestDeletedEntries(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, nil)
		s.add(entry("e1", "/one", 1000), entry("e2", "/two", 1000))
		ctx := withHeader(t.Context())
		c := s.client(1000)
		svids := fetchX509(t.Context(), c)
		bundles := receive(c.FetchX509Bundles(ctx, &workloadpb.X509BundlesRequest{}))
		one(t, svids)
		one(t, bundles)
		s.cache.Update(nil, []string{"e1"})
		time.Sleep(PushSpacing)
		if got := one(t, svids); !slices.Equal(ids(got), []string{"spiffe://example.org/two"}) {
			t.Errorf("got %v", ids(got))
		}
		s.cache.Update(nil, []string{"e2"})
		time.Sleep(PushSpacing)
		ended(t, svids, codes.PermissionDenied)
		ended(t, bundles, codes.PermissionDenied)
		if n := s.obs.streams("FetchX509SVID") + s.obs.streams("FetchX509Bundles"); n != 0 {
			t.Errorf("%d streams counted as open", n)
		}
	})
}

// Until the client has read an answer, the stream counts against the authority of the
// answer before.
func TestStreamCountsUntilRead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, nil)
		e := entry("e1", "/one", 1000)
		s.add(e)
		old := bundle.AuthorityID(s.ca.cert)
		in := fetchX509(t.Context(), s.client(1000))
		one(t, in)
		next := newAuthority(t, td, "b")
		s.cache.SetBundle(&bundle.Snapshot{Own: bundleOf(t, td, 2, s.ca, next)})
		time.Sleep(PushSpacing)
		one(t, in)
		s.ca = next
		s.put(e)
		synctest.Wait() // within the spacing: not sent yet
		streams := func(id string) int {
			for _, u := range s.cache.Authorities() {
				if u.Authority == id {
					return u.Streams
				}
			}
			return 0
		}
		if n := streams(old); n != 1 {
			t.Errorf("%d streams on the old authority before the push, want 1", n)
		}
		time.Sleep(PushSpacing)
		one(t, in)
		time.Sleep(PushSpacing) // until the server checks whether it was read
		synctest.Wait()
		if n := streams(old); n != 0 {
			t.Errorf("%d streams on the old authority after the push was read, want 0", n)
		}
	})
}

// While the client does not read an answer, both it and the one before count.
func TestStreamCountsWhileItIsBlocked(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, nil)
		e := entry("e1", "/one", 1000)
		s.cache.Update([]*cache.Entry{e}, nil)
		a, b := s.ca, newAuthority(t, td, "b")
		put := func(by *authority) {
			svid := *by.svid(t, e, time.Hour)
			svid.Intermediates = make([]byte, 3<<20) // more than the flow control window
			if err := s.cache.Put(&svid); err != nil {
				t.Fatal(err)
			}
		}
		put(a)
		if _, err := s.client(1000).FetchX509SVID(withHeader(t.Context()), &workloadpb.X509SVIDRequest{}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		put(b)
		time.Sleep(PushSpacing)
		synctest.Wait()
		got := map[string]int{}
		for _, u := range s.cache.Authorities() {
			got[u.Authority] = u.Streams
		}
		if got[bundle.AuthorityID(a.cert)] != 1 || got[bundle.AuthorityID(b.cert)] != 1 {
			t.Errorf("streams by authority: %v, want one each", got)
		}
	})
}

// A process that inherits a connection from one that has exited gets nothing on it.
func TestNoPushAfterTheCallerEnded(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, func(c *Config) {
			c.Peers = func(net.Conn) (*attest.Peer, error) { return attest.FromPID(cmd.Process.Pid, 1000, 0) }
		})
		e := entry("e1", "/one", 1000)
		s.add(e)
		c := s.client(1000)
		in := fetchX509(t.Context(), c)
		bundles := receive(c.FetchX509Bundles(withHeader(t.Context()), &workloadpb.X509BundlesRequest{}))
		one(t, in)
		one(t, bundles)
		cmd.Process.Kill()
		cmd.Wait()
		s.put(e)
		s.cache.SetBundle(&bundle.Snapshot{Own: bundleOf(t, td, 2, s.ca, newAuthority(t, td, "b"))})
		time.Sleep(PushSpacing)
		ended(t, in, codes.Unavailable)
		ended(t, bundles, codes.Unavailable)
		ended(t, fetchX509(t.Context(), c), codes.Unavailable)
	})
}

func TestOversizeAnswerIsSent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, nil)
		var all []*cache.Entry
		for i := range 3 {
			all = append(all, entry(fmt.Sprintf("e%02d", i), fmt.Sprintf("/w%d", i), 1000))
		}
		s.cache.Update(all, nil)
		put := func() {
			for _, e := range all {
				svid := *s.ca.svid(t, e, time.Hour)
				svid.Intermediates = make([]byte, 2<<20)
				if err := s.cache.Put(&svid); err != nil {
					t.Fatal(err)
				}
			}
		}
		put()
		in := fetchX509(t.Context(), s.client(1000))
		if got := one(t, in); len(got.Svids) != 3 {
			t.Errorf("got %d SVIDs", len(got.Svids))
		}
		put()
		time.Sleep(PushSpacing)
		one(t, in)
		if s.obs.oversize != 2 {
			t.Errorf("%d oversize answers counted, want 2", s.obs.oversize)
		}
		got := s.logs.attrs("answer larger than gRPC clients accept")
		if len(got) != 1 || got[0]["selectors"] != "unix:uid:1000" || got[0]["svids"] != "3" {
			t.Errorf("logged %v, want one warning that names the selectors", got)
		}
	})
}
