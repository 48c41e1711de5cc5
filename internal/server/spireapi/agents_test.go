package spireapi_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

const (
	notAttested = types.PermissionDeniedDetails_AGENT_NOT_ATTESTED
	notActive   = types.PermissionDeniedDetails_AGENT_NOT_ACTIVE
	expired     = types.PermissionDeniedDetails_AGENT_EXPIRED
	banned      = types.PermissionDeniedDetails_AGENT_BANNED
)

func (c *client) ping(ctx context.Context) error {
	_, err := c.PostStatus(ctx, &agentv1.PostStatusRequest{AgentVersion: "1.0"})
	return err
}

func TestAttestWithJoinToken(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		token := s.token(t)
		key, csr := newKey(t)
		c := s.dial(t, nil)
		svid, err := c.attest(t.Context(), "join_token", token, csr)
		if err != nil {
			t.Fatal(err)
		}
		caller := newIdentity(t, svid, key)
		if got, want := caller.id.String(), "spiffe://example.org/spire/agent/join_token/"+token; got != want {
			t.Errorf("agent ID %s, want %s", got, want)
		}
		if len(caller.chain) != 1 || svid.GetExpiresAt() != time.Now().Add(keyset.DefaultX509TTL).Unix() {
			t.Errorf("chain of %d, expires at %v", len(caller.chain), svid.GetExpiresAt())
		}
		if err := s.dial(t, caller).ping(t.Context()); err != nil {
			t.Errorf("first call: %v", err)
		}
		_, err = c.attest(t.Context(), "join_token", token, csr)
		wantCode(t, err, codes.InvalidArgument)
	})
}

func TestAttestRefuses(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		c := s.dial(t, nil)
		_, csr := newKey(t)
		token := s.token(t)
		for name, tt := range map[string]struct {
			kind, payload string
			csr           []byte
			code          codes.Code
		}{
			"no type":       {"", token, csr, codes.InvalidArgument},
			"unknown type":  {"tpm", token, csr, codes.FailedPrecondition},
			"no payload":    {"join_token", "", csr, codes.InvalidArgument},
			"no CSR":        {"join_token", token, nil, codes.InvalidArgument},
			"broken CSR":    {"join_token", token, []byte("x"), codes.InvalidArgument},
			"unknown token": {"join_token", "guessed", csr, codes.InvalidArgument},
		} {
			_, err := c.attest(t.Context(), tt.kind, tt.payload, tt.csr)
			t.Log(name, err)
			wantCode(t, err, tt.code)
		}
		// None of these has spent the token; then it expires.
		time.Sleep(61 * time.Second)
		_, err := c.attest(t.Context(), "join_token", token, csr)
		wantCode(t, err, codes.InvalidArgument)
		if !strings.Contains(err.Error(), "expired") {
			t.Errorf("late: %v", err)
		}
		if _, err := s.CreateJoinToken(t.Context(), 0, ""); err == nil {
			t.Error("made a token without lifetime")
		}
	})
}

// TestRefusedTokens: the agent learns why its join token is refused, and what to do; the
// server logs who has tried, and neither says the token.
func TestRefusedTokens(t *testing.T) {
	t.Parallel()
	log := new(records)
	bubble(t, spireapi.Config{Log: log.logger()}, func(t *testing.T, s *running) {
		_, csr := newKey(t)
		spent, err := s.CreateJoinToken(t.Context(), time.Hour, "rack 1")
		check(t, err)
		expired, err := s.CreateJoinToken(t.Context(), time.Minute, "")
		check(t, err)
		used := time.Now()
		id, err := s.dial(t, nil).attest(t.Context(), "join_token", spent.Value, csr)
		check(t, err)
		if agents, err := s.Agents(t.Context()); err != nil || len(agents) != 1 || agents[0].Label != "rack 1" {
			t.Errorf("agents %+v, %v", agents, err)
		}
		refused := func(token, want string) {
			t.Helper()
			time.Sleep(11 * time.Minute) // log lines about one address are limited
			_ = log.take(t, "node not attested")
			for range 3 {
				_, err := s.from(t, "10.0.0.1").dial(t, nil).attest(t.Context(), "join_token", token, csr)
				wantCode(t, err, codes.InvalidArgument)
				if !strings.Contains(err.Error(), want) || !strings.HasSuffix(err.Error(), `: create a new one for this node with "server token create"`) || strings.Contains(err.Error(), token) {
					t.Errorf("the agent gets %v, want %q", err, want)
				}
			}
			lines := log.take(t, "node not attested")
			if len(lines) != 1 || lines[0]["type"] != "join_token" || lines[0]["address"] != "10.0.0.1/32" || !strings.Contains(fmt.Sprint(lines[0]["error"]), want) ||
				strings.Contains(fmt.Sprint(lines), token) {
				t.Errorf("the log has %v", lines)
			}
		}
		again := "join token was already used, at " + used.UTC().Format(time.RFC3339) + "; it attests one agent, once"
		refused(spent.Value, again)
		check(t, s.EvictAgent(t.Context(), spiffeid.RequireFromPath(td, id.GetId().GetPath()), true))
		refused(spent.Value, again)
		refused(expired.Value, "join token expired at "+expired.ExpiresAt.UTC().Format(time.RFC3339))
		const unknown = "join token is not known to this deployment: it may be of another one, dropped by a restore, or have ended more than 7 days ago"
		refused("guessed", unknown)
		// Both are forgotten, at the latest when others are made a week after their end.
		time.Sleep(8 * 24 * time.Hour)
		_ = s.token(t)
		refused(spent.Value, unknown)
		refused(expired.Value, unknown)
	})
}

// TestTokenIsUsedOnce attests many agents with the same token at once.
func TestTokenIsUsedOnce(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		token := s.token(t)
		c := s.dial(t, nil)
		var wg sync.WaitGroup
		var mu sync.Mutex
		in := 0
		for range 20 {
			_, csr := newKey(t)
			wg.Go(func() {
				if _, err := c.attest(t.Context(), "join_token", token, csr); err == nil {
					mu.Lock()
					in++
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		if in != 1 {
			t.Errorf("%d agents attested", in)
		}
	})
}

// TestFailedAttestationKeepsToken: signing fails, and then the ledger. No agent
// attests, and the token remains valid.
func TestFailedAttestationKeepsToken(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var ahead atomic.Int64 // of the keysets' clock
		keys, err := keyset.Open(t.Context(), keyset.Config{TrustDomain: td, Storage: new(memory.Keysets), Now: func() time.Time {
			return time.Now().Add(time.Duration(ahead.Load()))
		}})
		check(t, err)
		b := newFakeLedger()
		s := start(t, spireapi.Config{Keysets: keys, Ledger: b})
		token := s.token(t)
		_, csr := newKey(t)
		c := s.dial(t, nil)
		_, err = c.GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
		check(t, err)
		fails := func(code codes.Code) {
			t.Helper()
			_, err := c.attest(t.Context(), "join_token", token, csr)
			wantCode(t, err, code)
			if agents, err := s.Agents(t.Context()); err != nil || len(agents) > 0 {
				t.Errorf("attested: %v, %v", agents, err)
			}
			if _, records := b.state(); records > 0 {
				t.Errorf("%d records", records)
			}
		}
		ahead.Store(int64(keyset.DefaultLifetime))
		fails(codes.Internal)
		ahead.Store(0)
		b.set(func(context.Context) error { return errors.New("disk full") })
		fails(codes.Unavailable)
		b.set(func(context.Context) error { return nil })
		_, err = c.attest(t.Context(), "join_token", token, csr)
		check(t, err)
		_, err = c.attest(t.Context(), "join_token", token, csr)
		wantCode(t, err, codes.InvalidArgument)
	})
}

func TestCallerMustBeAnAgent(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		anyone := s.dial(t, nil)
		wantCode(t, anyone.ping(t.Context()), codes.PermissionDenied, notAttested)
		stream, err := anyone.SyncAuthorizedEntries(t.Context())
		if err == nil {
			_, err = stream.Recv()
		}
		wantCode(t, err, codes.PermissionDenied, notAttested)

		// A workload's SVID is not an agent SVID.
		key, _ := newKey(t)
		id := spiffeid.RequireFromPath(td, "/workload")
		svid, err := s.Keysets().SignX509(id, key.Public(), 0)
		if err != nil {
			t.Fatal(err)
		}
		caller := newIdentity(t, &types.X509SVID{CertChain: [][]byte{svid.DER}, Id: &types.SPIFFEID{Path: "/workload"}}, key)
		wantCode(t, s.dial(t, caller).ping(t.Context()), codes.PermissionDenied, notAttested)

		// The handshake fails with an SVID of another authority.
		other, err := keyset.Open(t.Context(), keyset.Config{TrustDomain: td, Storage: new(memory.Keysets)})
		if err != nil {
			t.Fatal(err)
		}
		svid, err = other.SignX509(id, key.Public(), 0)
		if err != nil {
			t.Fatal(err)
		}
		caller = newIdentity(t, &types.X509SVID{CertChain: [][]byte{svid.DER}, Id: &types.SPIFFEID{Path: "/workload"}}, key)
		wantCode(t, s.dial(t, caller).ping(t.Context()), codes.Unavailable)
	})
}

func TestRenewAgent(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		old, oldConn := s.join(t)
		renew := func(c *client) *identity {
			t.Helper()
			key, csr := newKey(t)
			resp, err := c.RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr}})
			if err != nil {
				t.Fatal(err)
			}
			return newIdentity(t, resp.GetSvid(), key)
		}
		forgotten := renew(oldConn)
		next := renew(oldConn)
		if next.id != old.id {
			t.Errorf("renewed as %v, was %v", next.id, old.id)
		}
		// The old SVID is active until the new one is used; of two new ones, the last counts.
		if err := oldConn.ping(t.Context()); err != nil {
			t.Errorf("old SVID before the first use of the new one: %v", err)
		}
		wantCode(t, s.dial(t, forgotten).ping(t.Context()), codes.PermissionDenied, notActive)
		nextConn := s.dial(t, next)
		for range 2 {
			if err := nextConn.ping(t.Context()); err != nil {
				t.Errorf("new SVID: %v", err)
			}
		}
		wantCode(t, oldConn.ping(t.Context()), codes.PermissionDenied, notActive)
		_, err := oldConn.RenewAgent(t.Context(), &agentv1.RenewAgentRequest{})
		wantCode(t, err, codes.PermissionDenied, notActive)
		_, err = nextConn.RenewAgent(t.Context(), &agentv1.RenewAgentRequest{})
		wantCode(t, err, codes.InvalidArgument)
		_, err = nextConn.RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: []byte("x")}})
		wantCode(t, err, codes.InvalidArgument)
	})
}

func TestBanAndEvict(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		caller, c := s.join(t)
		if err := s.BanAgent(t.Context(), caller.id); err != nil {
			t.Fatal(err)
		}
		wantCode(t, c.ping(t.Context()), codes.PermissionDenied, banned)
		if err := s.EvictAgent(t.Context(), caller.id, false); err != nil {
			t.Fatal(err)
		}
		wantCode(t, c.ping(t.Context()), codes.PermissionDenied, notAttested)
		for _, err := range []error{s.BanAgent(t.Context(), caller.id), s.EvictAgent(t.Context(), caller.id, false)} {
			if !errors.Is(err, spireapi.ErrNotFound) {
				t.Errorf("unknown agent: %v", err)
			}
		}
	})
}

// TestSVIDExpiresOnOpenConnection keeps a connection open until its SVID has expired.
func TestSVIDExpiresOnOpenConnection(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{X509TTL: time.Hour, ConnectionAge: -1}, func(t *testing.T, s *running) {
		caller, c := s.join(t)
		if err := c.ping(t.Context()); err != nil {
			t.Fatal(err)
		}
		// A call in flight keeps the client from going idle.
		stream, err := c.SyncAuthorizedEntries(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(29 * time.Minute)
		if err := c.ping(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(29 * time.Minute)
		if err := c.ping(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2*time.Minute + time.Second)
		wantCode(t, c.ping(t.Context()), codes.PermissionDenied, expired)
		// The handshake of a new connection fails.
		wantCode(t, s.dial(t, caller).ping(t.Context()), codes.Unavailable)
	})
}

func TestPostStatus(t *testing.T) {
	t.Parallel()
	store := memory.NewServer()
	bubble(t, spireapi.Config{Storage: store}, func(t *testing.T, s *running) {
		caller, c := s.join(t)
		post := func(version string) error {
			_, err := c.PostStatus(t.Context(), &agentv1.PostStatusRequest{AgentVersion: version})
			return err
		}
		long := strings.Repeat("ä", 255)
		if err := post(long); err != nil {
			t.Errorf("255 characters: %v", err)
		}
		wantCode(t, post(long+"x"), codes.InvalidArgument)
		if err := post(""); err != nil {
			t.Errorf("no version: %v", err)
		}
		if a, err := store.Agent(t.Context(), caller.id); err != nil || a.Version != long {
			t.Errorf("stored %v, %v", a, err)
		}
	})
}

func TestOtherMethodsAreUnimplemented(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		_, c := s.join(t)
		_, err := c.ListAgents(t.Context(), &agentv1.ListAgentsRequest{})
		wantCode(t, err, codes.Unimplemented)
		_, err = c.ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
		wantCode(t, err, codes.Unimplemented)
	})
}

// TestRestart starts a second server on the storage of the first.
func TestRestart(t *testing.T) {
	t.Parallel()
	keys, store := new(memory.Keysets), memory.NewServer()
	bubble(t, spireapi.Config{Storage: store, Keysets: openKeysets(t, keys)}, func(t *testing.T, s *running) {
		s.apply(t, []spireapi.Entry{entry("a")})
		caller, _ := s.join(t)
		before := s.fetch(t, caller)
		s.stop()
		again := start(t, spireapi.Config{Storage: store, Keysets: openKeysets(t, keys)})
		after := again.fetch(t, caller)
		if len(after) != 1 || after["a"].String() != before["a"].String() {
			t.Errorf("entries are %v, were %v", after, before)
		}
		if _, err := again.UpsertEntry(t.Context(), entry("a", func(e *spireapi.Entry) { e.Hint = "new" })); err != nil {
			t.Fatal(err)
		}
		if got := again.fetch(t, caller)["a"].GetRevisionNumber(); got <= before["a"].GetRevisionNumber() {
			t.Errorf("revision %d after %d", got, before["a"].GetRevisionNumber())
		}
	})
}

// TestRestoredAgents starts a server on a copy of storage from before some agents
// renewed their SVIDs.
func TestRestoredAgents(t *testing.T) {
	t.Parallel()
	keys, store := new(memory.Keysets), memory.NewServer()
	synctest.Test(t, func(t *testing.T) {
		open := func() *keyset.Deployment {
			d, err := keyset.Open(t.Context(), keyset.Config{TrustDomain: td, Storage: keys})
			check(t, err)
			return d
		}
		s := start(t, spireapi.Config{Storage: store, Keysets: open()})
		renew := func(caller *identity) *identity {
			t.Helper()
			key, csr := newKey(t)
			resp, err := s.dial(t, caller).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr}})
			check(t, err)
			return newIdentity(t, resp.GetSvid(), key)
		}
		idle, _ := s.join(t)
		busy, _ := s.join(t)
		banned, _ := s.join(t)
		old, _ := s.join(t)
		time.Sleep(time.Hour)
		old2 := renew(old)
		check(t, s.dial(t, old2).ping(t.Context()))
		time.Sleep(time.Hour)

		copied := time.Now()
		copyOf := memory.NewServer()
		agents, err := store.Agents(t.Context())
		check(t, err)
		for _, a := range agents {
			a.Banned = a.ID == banned.id
			_, err := copyOf.UpdateAgent(t.Context(), a.ID, func(*spireapi.Agent) (*spireapi.Agent, error) { return &a, nil })
			check(t, err)
		}
		time.Sleep(time.Hour)
		busy2, banned2 := renew(busy), renew(banned)
		check(t, s.dial(t, busy2).ping(t.Context()))
		time.Sleep(time.Hour)
		busy3 := renew(busy2)
		late, _ := s.join(t)
		restored := time.Now()
		time.Sleep(time.Hour)
		s.stop()

		plain := start(t, spireapi.Config{Storage: copyOf, Keysets: open()})
		wantCode(t, plain.dial(t, busy3).ping(t.Context()), codes.PermissionDenied, notActive)
		plain.stop()

		s = start(t, spireapi.Config{Storage: copyOf, Keysets: open(), Lost: []spireapi.Lost{{From: copied, To: restored}, {From: time.Now(), To: time.Now()}}})
		for name, caller := range map[string]*identity{"that has not renewed": idle, "that has renewed before the copy": old2, "that has renewed twice since": busy3} {
			for range 2 {
				if err := s.dial(t, caller).ping(t.Context()); err != nil {
					t.Errorf("an agent %s: %v", name, err)
				}
			}
		}
		wantCode(t, s.dial(t, busy2).ping(t.Context()), codes.PermissionDenied, notActive) // one that was replaced
		wantCode(t, s.dial(t, busy).ping(t.Context()), codes.PermissionDenied, notActive)
		wantCode(t, s.dial(t, old).ping(t.Context()), codes.PermissionDenied, notActive) // replaced before the copy
		wantCode(t, s.dial(t, banned2).ping(t.Context()), codes.PermissionDenied, types.PermissionDeniedDetails_AGENT_BANNED)
		wantCode(t, s.dial(t, late).ping(t.Context()), codes.PermissionDenied, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)

		// SVIDs that are signed from now on are in storage: one that is replaced before
		// its first use is refused.
		forgotten := renew(busy3)
		time.Sleep(time.Second)
		renew(busy3)
		wantCode(t, s.dial(t, forgotten).ping(t.Context()), codes.PermissionDenied, notActive)
	})
}

// openKeysets uses the bubble's clock, which starts in 2000.
func openKeysets(t *testing.T, store keyset.Storage) *keyset.Deployment {
	t.Helper()
	d, err := keyset.Open(t.Context(), keyset.Config{TrustDomain: td, Storage: store, Now: func() time.Time {
		return time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
	}})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// fetch returns all entries of an agent, with GetAuthorizedEntries.
func (r *running) fetch(t *testing.T, caller *identity) map[string]*types.Entry {
	t.Helper()
	resp, err := r.dial(t, caller).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	byID := make(map[string]*types.Entry)
	for _, e := range resp.GetEntries() {
		byID[e.GetId()] = e
	}
	return byID
}
