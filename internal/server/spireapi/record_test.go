package spireapi_test

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// signing are all calls that sign. Each returns the SVID that the server sent.
var signing = map[string]func(ctx context.Context, t *testing.T, s *running, c *client) (any, error){
	"AttestAgent": func(ctx context.Context, t *testing.T, s *running, _ *client) (any, error) {
		_, csr := newKey(t)
		svid, err := s.dial(t, nil).attest(ctx, "join_token", s.token(t), csr)
		if svid == nil {
			return nil, err
		}
		return svid, err
	},
	"RenewAgent": func(ctx context.Context, t *testing.T, _ *running, c *client) (any, error) {
		_, csr := newKey(t)
		resp, err := c.RenewAgent(ctx, &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr}})
		if resp == nil {
			return nil, err
		}
		return resp.GetSvid(), err
	},
	"BatchNewX509SVID": func(ctx context.Context, t *testing.T, _ *running, c *client) (any, error) {
		_, csr := newKey(t)
		resp, err := c.BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: "a", Csr: csr}}})
		if resp == nil {
			return nil, err
		}
		return resp.GetResults()[0].GetSvid(), err
	},
	"NewJWTSVID": func(ctx context.Context, _ *testing.T, _ *running, c *client) (any, error) {
		resp, err := c.NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: "a", Audience: []string{"x"}})
		if resp == nil {
			return nil, err
		}
		return resp.GetSvid(), err
	},
}

// eachSigning runs f for each of them, with an agent and an entry "a" in place.
func eachSigning(t *testing.T, f func(t *testing.T, s *running, b *fakeLedger, seen *counts, mint func(context.Context) (any, error))) {
	for name, call := range signing {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, seen := newFakeLedger(), &counts{by: make(map[string]int)}
			bubble(t, spireapi.Config{Ledger: b, Observer: seen}, func(t *testing.T, s *running) {
				_, c := s.join(t)
				s.apply(t, []spireapi.Entry{entry("a")})
				f(t, s, b, seen, func(ctx context.Context) (any, error) { return call(ctx, t, s, c) })
			})
		})
	}
}

// TestRecordedBeforeAnswered blocks the ledger: no call is answered until the ledger
// has been written.
func TestRecordedBeforeAnswered(t *testing.T) {
	t.Parallel()
	eachSigning(t, func(t *testing.T, _ *running, b *fakeLedger, _ *counts, mint func(context.Context) (any, error)) {
		release := make(chan struct{})
		b.set(func(context.Context) error { <-release; return nil })
		_, before := b.state()
		answered := make(chan error, 1)
		go func() {
			_, err := mint(t.Context())
			answered <- err
		}()
		time.Sleep(30 * time.Second)
		synctest.Wait()
		if signing, records := b.state(); len(answered) > 0 || signing != 1 || records != before {
			t.Errorf("%d answers, %d calls signing, %d records while the ledger waits", len(answered), signing, records-before)
		}
		close(release)
		if err := <-answered; err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if signing, records := b.state(); signing != 0 || records != before+1 {
			t.Errorf("%d calls signing, %d records after the answer", signing, records-before)
		}
	})
}

// TestUnrecordedIsNotSent: the ledger fails.
func TestUnrecordedIsNotSent(t *testing.T) {
	t.Parallel()
	eachSigning(t, func(t *testing.T, s *running, b *fakeLedger, seen *counts, mint func(context.Context) (any, error)) {
		b.set(func(context.Context) error { return errors.New("disk full") })
		got, err := mint(t.Context())
		wantCode(t, err, codes.Unavailable)
		if got != nil {
			t.Errorf("handed out %v", got)
		}
		synctest.Wait()
		if signing, _ := b.state(); signing != 0 {
			t.Errorf("%d calls are still signing", signing)
		}
		if n := seen.total("OK"); n > 0 {
			t.Errorf("%d mints are counted as OK", n)
		}
		// Calls succeed as soon as the ledger can be written.
		b.set(func(context.Context) error { return nil })
		if _, err := mint(t.Context()); err != nil {
			t.Errorf("afterwards: %v", err)
		}
	})
}

// TestCallerLeaves cancels the call while the ledger writes. The ledger may record
// the SVID, and the caller does not receive it.
func TestCallerLeaves(t *testing.T) {
	t.Parallel()
	eachSigning(t, func(t *testing.T, _ *running, b *fakeLedger, seen *counts, mint func(context.Context) (any, error)) {
		b.set(func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		got, err := mint(ctx)
		wantCode(t, err, codes.DeadlineExceeded)
		if got != nil {
			t.Errorf("handed out %v", got)
		}
		synctest.Wait()
		if signing, _ := b.state(); signing != 0 {
			t.Errorf("%d calls are still signing", signing)
		}
		if n := seen.total("OK"); n > 0 {
			t.Errorf("%d mints are counted as OK", n)
		}
	})
}

// TestBegunBeforeSigning activates another keyset in Begin: an SVID that was signed
// before Begin would be of the old one.
func TestBegunBeforeSigning(t *testing.T) {
	t.Parallel()
	eachSigning(t, func(t *testing.T, s *running, b *fakeLedger, _ *counts, mint func(context.Context) (any, error)) {
		keys := s.Keysets()
		next, err := keys.Prepare(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		b.mu.Lock()
		b.onBegin = sync.OnceFunc(func() {
			if err := keys.Activate(t.Context(), next.ID); err != nil {
				t.Error(err)
			}
		})
		b.mu.Unlock()
		got, err := mint(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var by, recorded, want string
		switch svid := got.(type) {
		case *types.X509SVID:
			by, recorded, want = authorityOf(t, svid), b.last()[0].Authority, next.X509AuthorityID
		case *types.JWTSVID:
			token := parseJWT(t, svid)
			by, recorded, want = token.Headers[0].KeyID, only(t, b.jwt), next.JWTKeyID
		}
		if by != want || recorded != want {
			t.Errorf("signed by %s, recorded as %s, want %s", by, recorded, want)
		}
	})
}

func authorityOf(t *testing.T, svid *types.X509SVID) string {
	t.Helper()
	return hex.EncodeToString(newIdentity(t, svid, nil).chain[0].AuthorityKeyId)
}

func parseJWT(t *testing.T, svid *types.JWTSVID) *jwt.JSONWebToken {
	t.Helper()
	token, err := jwt.ParseSigned(svid.GetToken(), []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func only(t *testing.T, m map[string]time.Time) string {
	t.Helper()
	if len(m) != 1 {
		t.Errorf("%d keys are recorded", len(m))
	}
	for key := range m {
		return key
	}
	return ""
}

// TestRecordsMatchAnswers: there is one record for a batch, with exactly the SVIDs
// that were signed.
func TestRecordsMatchAnswers(t *testing.T) {
	t.Parallel()
	b, seen := newFakeLedger(), &counts{by: make(map[string]int)}
	bubble(t, spireapi.Config{Ledger: b, Observer: seen}, func(t *testing.T, s *running) {
		caller, c := s.join(t)
		if rows := b.last(); len(rows) != 1 || rows[0] != rowOf(t, caller, "", caller.chain[0].NotAfter) {
			t.Errorf("after joining: %v", rows)
		}
		s.apply(t, []spireapi.Entry{entry("a"), entry("b", func(e *spireapi.Entry) { e.X509TTL = time.Hour })})
		_, csr := newKey(t)
		batch := func(csr []byte, ids ...string) []*svidv1.BatchNewX509SVIDResponse_Result {
			t.Helper()
			req := &svidv1.BatchNewX509SVIDRequest{}
			for _, id := range ids {
				req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: id, Csr: csr})
			}
			resp, err := c.BatchNewX509SVID(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			return resp.GetResults()
		}
		_, before := b.state()
		results := batch(csr, "b", "unknown", "a")
		want := []ledger.Row{
			rowOf(t, caller, "b", time.Unix(results[0].GetSvid().GetExpiresAt(), 0)),
			rowOf(t, caller, "a", time.Unix(results[2].GetSvid().GetExpiresAt(), 0)),
		}
		if _, after := b.state(); after != before+1 || fmt.Sprint(b.last()) != fmt.Sprint(want) {
			t.Errorf("%d records, the last is %v, want %v", after-before, b.last(), want)
		}
		batch([]byte("x"), "a", "b")
		if _, after := b.state(); after != before+1 {
			t.Error("a batch without any signature is recorded")
		}

		key, renewed := newKey(t)
		resp, err := c.RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: renewed}})
		if err != nil {
			t.Fatal(err)
		}
		caller = newIdentity(t, resp.GetSvid(), key)
		if rows := b.last(); len(rows) != 1 || rows[0] != rowOf(t, caller, "", caller.chain[0].NotAfter) {
			t.Errorf("after the renewal: %v", rows)
		}

		token, err := s.dial(t, caller).NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: "a", Audience: []string{"x"}})
		if err != nil {
			t.Fatal(err)
		}
		kid := parseJWT(t, token.GetSvid()).Headers[0].KeyID
		if only(t, b.jwt) != kid || b.jwt[kid].Unix() != token.GetSvid().GetExpiresAt() {
			t.Errorf("recorded %v, want %s until %d", b.jwt, kid, token.GetSvid().GetExpiresAt())
		}

		// If the ledger fails, the mints are counted with its code; in a batch only those
		// that were signed.
		b.set(func(context.Context) error { return errors.New("disk full") })
		c = s.dial(t, caller)
		_, err = c.BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{
			Params: []*svidv1.NewX509SVIDParams{{EntryId: "a", Csr: csr}, {EntryId: "unknown", Csr: csr}},
		})
		wantCode(t, err, codes.Unavailable)
		_, err = c.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: "a", Audience: []string{"x"}})
		wantCode(t, err, codes.Unavailable)
		want2 := "map[jwt OK:1 jwt Unavailable:1 x509 InvalidArgument:2 x509 NotFound:2 x509 OK:2 x509 Unavailable:1]"
		if got := fmt.Sprint(seen.by); got != want2 {
			t.Errorf("observed %s, want %s", got, want2)
		}
	})
}

func rowOf(t *testing.T, caller *identity, entryID string, notAfter time.Time) ledger.Row {
	t.Helper()
	return ledger.Row{
		Authority: hex.EncodeToString(caller.chain[0].AuthorityKeyId), Agent: caller.id.String(), Entry: entryID, NotAfter: notAfter.UTC(),
	}
}

// TestRefusedIsNotRecorded bans an agent between the authorization and the record
// of its renewal, and attests with a token that does not exist.
func TestRefusedIsNotRecorded(t *testing.T) {
	t.Parallel()
	b := newFakeLedger()
	bubble(t, spireapi.Config{Ledger: b}, func(t *testing.T, s *running) {
		caller, c := s.join(t)
		_, before := b.state()
		_, csr := newKey(t)
		_, err := s.dial(t, nil).attest(t.Context(), "join_token", "guessed", csr)
		wantCode(t, err, codes.InvalidArgument)
		b.mu.Lock()
		b.onBegin = func() {
			if err := s.BanAgent(t.Context(), caller.id); err != nil {
				t.Error(err)
			}
		}
		b.mu.Unlock()
		_, err = c.RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr}})
		wantCode(t, err, codes.PermissionDenied, banned)
		if _, after := b.state(); after != before {
			t.Errorf("%d records", after-before)
		}
	})
}

func TestEvictAgentThatIsGone(t *testing.T) {
	t.Parallel()
	b := newFakeLedger()
	bubble(t, spireapi.Config{Ledger: b}, func(t *testing.T, s *running) {
		caller, c := s.join(t)
		if err := s.EvictAgent(t.Context(), caller.id, false); err != nil || len(b.gone) > 0 {
			t.Fatalf("evicted: %v, gone are %v", err, b.gone)
		}
		wantCode(t, c.ping(t.Context()), codes.PermissionDenied, notAttested)
		// The server has no data of it, the ledger has.
		b.set(func(context.Context) error { return errors.New("disk full") })
		if err := s.EvictAgent(t.Context(), caller.id, true); err == nil {
			t.Error("no error, although it is still counted")
		}
		b.set(func(context.Context) error { return nil })
		if err := s.EvictAgent(t.Context(), caller.id, true); err != nil || fmt.Sprint(b.gone) != fmt.Sprint([]string{caller.id.String()}) {
			t.Errorf("gone: %v, %v", err, b.gone)
		}
		caller, c = s.join(t)
		if err := s.EvictAgent(t.Context(), caller.id, true); err != nil || len(b.gone) != 2 {
			t.Errorf("evicted and gone at once: %v, %v", err, b.gone)
		}
		// An agent that is unknown to both is not found.
		for _, id := range []spiffeid.ID{caller.id, spiffeid.RequireFromPath(td, "/spire/agent/join_token/MISTYPED"), spiffeid.RequireFromPath(td, "/web"), spiffeid.RequireFromString("spiffe://other.org/spire/agent/join_token/X")} {
			if err := s.EvictAgent(t.Context(), id, true); !errors.Is(err, spireapi.ErrNotFound) || len(b.gone) != 2 {
				t.Errorf("%s: %v, gone are %v", id, err, b.gone)
			}
		}
		wantCode(t, c.ping(t.Context()), codes.PermissionDenied, notAttested)
	})
}
