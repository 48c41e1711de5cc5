package spireapi_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"

	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

func counted(t *testing.T, store spireapi.Storage) (tokens, agents int) {
	t.Helper()
	ts, err := store.Tokens(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	as, err := store.Agents(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return len(ts), len(as)
}

// TestExpiredTokensAreDeleted makes tokens for years, with a restart in between.
func TestExpiredTokensAreDeleted(t *testing.T) {
	t.Parallel()
	keys, store := new(memory.Keysets), memory.NewServer()
	bubble(t, spireapi.Config{Storage: store, Keysets: openKeysets(t, keys)}, func(t *testing.T, s *running) {
		for range 30 {
			s.token(t)
		}
		if tokens, _ := counted(t, store); tokens != 30 {
			t.Fatalf("%d tokens: a valid one was deleted", tokens)
		}
		s.stop()
		again := start(t, spireapi.Config{Storage: store, Keysets: openKeysets(t, keys)})
		for range 100 {
			time.Sleep(10 * 24 * time.Hour)
			again.token(t)
		}
		if tokens, _ := counted(t, store); tokens != 1 {
			t.Errorf("%d tokens are kept", tokens)
		}
	})
}

// TestExpiredAgentsAreDeleted: one agent stops, one renews and one is banned.
func TestExpiredAgentsAreDeleted(t *testing.T) {
	t.Parallel()
	store := memory.NewServer()
	bubble(t, spireapi.Config{Storage: store}, func(t *testing.T, s *running) {
		silent, _ := s.join(t)
		banned, _ := s.join(t)
		if err := s.BanAgent(t.Context(), banned.id); err != nil {
			t.Fatal(err)
		}
		busy, _ := s.join(t)
		deleted := time.Now().Add(8 * 24 * time.Hour)
		for time.Now().Before(deleted) {
			key, csr := newKey(t)
			resp, err := s.dial(t, busy).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr}})
			if err != nil {
				t.Fatal(err)
			}
			busy = newIdentity(t, resp.GetSvid(), key)
			if agents, err := s.Agents(t.Context()); err != nil || len(agents) != 3 {
				t.Fatalf("%v before its time: %v, %v", time.Until(deleted), agents, err)
			}
			time.Sleep(12 * time.Hour)
			s.token(t)
		}
		time.Sleep(time.Second)
		s.token(t)
		agents, err := s.Agents(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		left := make(map[spiffeid.ID]bool)
		for _, a := range agents {
			left[a.ID] = true
		}
		if len(left) != 2 || left[silent.id] || !left[busy.id] || !left[banned.id] {
			t.Errorf("left are %v", left)
		}
		// The retention of the one that renewed is over, too.
		time.Sleep(9 * 24 * time.Hour)
		for range 4 { // the tokens' retention is over, too, and a sweep is bounded
			s.token(t)
		}
		if _, agents := counted(t, store); agents != 1 {
			t.Errorf("%d agents are kept", agents)
		}
	})
}

// stuck is a storage whose deletions fail for a while, and which counts them.
type stuck struct {
	*memory.Server
	on    atomic.Bool
	tries atomic.Int64
}

func (s *stuck) TakeToken(ctx context.Context, value string) (spireapi.Token, error) {
	s.tries.Add(1)
	if s.on.Load() {
		return spireapi.Token{}, errors.New("disk full")
	}
	return s.Server.TakeToken(ctx, value)
}

// TestSweepIsBounded: one call deletes a bounded number of tokens, and a failed
// deletion is retried later.
func TestSweepIsBounded(t *testing.T) {
	t.Parallel()
	store := &stuck{Server: memory.NewServer()}
	bubble(t, spireapi.Config{Storage: store}, func(t *testing.T, s *running) {
		for range 25 {
			s.token(t)
		}
		time.Sleep(7*24*time.Hour + time.Hour)
		store.on.Store(true)
		s.token(t)
		if n := store.tries.Load(); n != 1 {
			t.Errorf("%d tries while nothing can be deleted", n)
		}
		store.on.Store(false)
		for i, want := range []int{17, 8, 5} {
			s.token(t)
			if tokens, _ := counted(t, store); tokens != want {
				t.Errorf("%d tokens after call %d, want %d", tokens, i, want)
			}
		}
		// The one that could not be deleted has not blocked the others, and is deleted now.
		time.Sleep(7*24*time.Hour + time.Hour + time.Second)
		s.token(t)
		if tokens, _ := counted(t, store); tokens != 1 {
			t.Errorf("%d tokens are kept", tokens)
		}
	})
}

// TestClockAheadDeletesNothing: a clock that is years ahead of the lower bound of
// the time deletes no agent.
func TestClockAheadDeletesNothing(t *testing.T) {
	t.Parallel()
	store := memory.NewServer()
	var ahead atomic.Int64
	now := func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	bubble(t, spireapi.Config{Storage: store, Now: now, AtLeast: time.Now}, func(t *testing.T, s *running) {
		s.join(t)
		s.token(t)
		ahead.Store(int64(5 * 365 * 24 * time.Hour))
		s.token(t)
		if tokens, agents := counted(t, store); tokens != 3 || agents != 1 {
			t.Errorf("%d tokens and %d agents are kept, want 3 and 1", tokens, agents)
		}
	})
}
