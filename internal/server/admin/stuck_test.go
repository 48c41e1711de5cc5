package admin_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/operator/renewd"
	"github.com/renewd/renewd/internal/server/admin"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

// stuck is a server's storage whose reads and writes can hang and ignore contexts.
type stuck struct {
	*memory.Server
	mu   sync.Mutex
	gate chan struct{}
}

// hang blocks all calls until release is called.
func (s *stuck) hang() (release func()) {
	gate := make(chan struct{})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gate = gate
	return func() {
		s.mu.Lock()
		s.gate = nil
		s.mu.Unlock()
		close(gate)
	}
}

func (s *stuck) wait() {
	s.mu.Lock()
	gate := s.gate
	s.mu.Unlock()
	if gate != nil {
		<-gate
	}
}

func (s *stuck) PutToken(ctx context.Context, t spireapi.Token, audit ...*spireapi.AuditRecord) error {
	s.wait()
	return s.Server.PutToken(ctx, t, audit...)
}

func (s *stuck) TakeToken(ctx context.Context, value string) (spireapi.Token, error) {
	s.wait()
	return s.Server.TakeToken(ctx, value)
}

func (s *stuck) Agent(ctx context.Context, id spiffeid.ID) (*spireapi.Agent, error) {
	s.wait()
	return s.Server.Agent(ctx, id)
}

func (s *stuck) UpdateAgent(ctx context.Context, id spiffeid.ID, change func(*spireapi.Agent) (*spireapi.Agent, error), audit ...*spireapi.AuditRecord) (*spireapi.Agent, error) {
	s.wait()
	return s.Server.UpdateAgent(ctx, id, change, audit...)
}

func (s *stuck) Agents(ctx context.Context) ([]spireapi.Agent, error) {
	s.wait()
	return s.Server.Agents(ctx)
}

func (s *stuck) PutEntries(ctx context.Context, put []spireapi.StoredEntry, gone []string, audit ...*spireapi.AuditRecord) error {
	s.wait()
	return s.Server.PutEntries(ctx, put, gone, audit...)
}

// stuckWorld returns a world whose deployment stores agents, tokens and entries in stuck.
func stuckWorld(t *testing.T) (*world, *stuck) {
	t.Helper()
	w := newWorld(t)
	d, disk := w.only(), new(stuck)
	disk.Server = d.kept
	var err error
	d.server, err = spireapi.New(spireapi.Config{TrustDomain: td, Keysets: d.keysets, Storage: disk, Ledger: d.ledger})
	check(t, err)
	rules, err := admin.ParseRules(td, []string{boss.String()}, []string{viewer.String()})
	check(t, err)
	w.Service, err = admin.New(admin.Config{
		TrustDomain: td, Rules: rules, Published: w.published, Certificate: d.certificate,
		Deployments: []admin.Deployment{{Name: "default", Keysets: d.keysets, Server: d.server, Ledger: d.ledger}},
	})
	check(t, err)
	return w, disk
}

// TestStuckDisk: each call ends after two minutes with an unknown outcome. Its work ends when
// the disk answers.
func TestStuckDisk(t *testing.T) {
	t.Parallel()
	entry := func(id string) *api.Entry {
		return &api.Entry{Id: id, SpiffeId: "spiffe://example.org/" + id, Selectors: []*api.Selector{{Type: "unix", Value: "uid:0"}}}
	}
	one := agent("one")
	ids := func(_ context.Context, w *world) string {
		var out []string
		for _, e := range w.only().server.Entries() {
			out = append(out, e.ID)
		}
		return strings.Join(out, " ")
	}
	for name, call := range map[string]struct {
		do    func(context.Context, *renewd.Client) error
		then  func(context.Context, *world) string // when the disk answers
		wants string
	}{
		"create a token": {
			func(ctx context.Context, c *renewd.Client) error {
				_, err := c.CreateJoinToken(ctx, &api.CreateJoinTokenRequest{})
				return err
			},
			func(ctx context.Context, w *world) string {
				all, err := w.only().kept.Tokens(ctx)
				return fmt.Sprint(len(all) > 0, err)
			}, "true <nil>",
		},
		"ban": {
			func(ctx context.Context, c *renewd.Client) error {
				_, err := c.BanAgent(ctx, &api.BanAgentRequest{AgentId: one.String()})
				return err
			},
			func(ctx context.Context, w *world) string {
				a, err := w.only().kept.Agent(ctx, one)
				return fmt.Sprint(a.Banned, err)
			}, "true <nil>",
		},
		"evict": {
			func(ctx context.Context, c *renewd.Client) error {
				_, err := c.EvictAgent(ctx, &api.EvictAgentRequest{AgentId: one.String(), Gone: true})
				return err
			},
			func(ctx context.Context, w *world) string {
				a, err := w.only().kept.Agent(ctx, one)
				return fmt.Sprint(a == nil, err)
			}, "true <nil>",
		},
		"apply entries": {
			func(ctx context.Context, c *renewd.Client) error {
				_, err := c.ApplyEntries(ctx, &api.ApplyEntriesRequest{Entries: []*api.Entry{entry("b"), entry("c")}, Remove: new(int64(1))})
				return err
			}, ids, "b c",
		},
		"put an entry": {
			func(ctx context.Context, c *renewd.Client) error {
				_, err := c.PutEntry(ctx, &api.PutEntryRequest{Entry: entry("b")})
				return err
			}, ids, "a b",
		},
		"delete an entry": {
			func(ctx context.Context, c *renewd.Client) error {
				_, err := c.DeleteEntry(ctx, &api.DeleteEntryRequest{Id: "a"})
				return err
			}, ids, "",
		},
		"list agents": {
			func(ctx context.Context, c *renewd.Client) error {
				_, err := c.ListAgents(ctx, &api.ListAgentsRequest{})
				return err
			}, ids, "a",
		},
		"list keysets": {
			func(ctx context.Context, c *renewd.Client) error {
				_, err := c.ListKeysets(ctx, &api.ListKeysetsRequest{})
				return err
			}, ids, "a",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w, disk := stuckWorld(t)
				w.only().attest(t, spireapi.Agent{ID: one, Serial: "1", ExpiresAt: time.Now().Add(time.Hour)})
				r := w.serveTLS(t)
				c := r.as(t, w, boss)
				_, err := c.PutEntry(t.Context(), &api.PutEntryRequest{Entry: entry("a")})
				check(t, err)
				release := disk.hang()
				begin := time.Now()
				err = call.do(t.Context(), c)
				if took := time.Since(begin); status.Code(err) != codes.DeadlineExceeded || took != 2*time.Minute || !strings.Contains(err.Error(), "outcome is open") {
					t.Errorf("after %v: %v", took, err)
				}
				// A second call waits no longer.
				err = call.do(t.Context(), c)
				if took := time.Since(begin); status.Code(err) != codes.DeadlineExceeded || took != 4*time.Minute {
					t.Errorf("the second, after %v: %v", took, err)
				}
				release()
				w.Wait()
				if got := call.then(t.Context(), w); got != call.wants {
					t.Errorf("when the disk answers: %s, want %s", got, call.wants)
				}
				if _, err := c.PutEntry(t.Context(), &api.PutEntryRequest{Entry: entry("z")}); err != nil {
					t.Errorf("afterwards: %v", err)
				}
			})
		})
	}
}

// TestStuckDiskAtShutdown: serving ends although the disk does not answer.
func TestStuckDiskAtShutdown(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w, disk := stuckWorld(t)
		r := w.serveTLS(t)
		c := r.as(t, w, viewer)
		_, err := c.ListAgents(t.Context(), &api.ListAgentsRequest{})
		check(t, err)
		defer disk.hang()()
		begin, answer := time.Now(), make(chan error, 1)
		go func() {
			_, err := c.ListAgents(t.Context(), &api.ListAgentsRequest{})
			answer <- err
		}()
		synctest.Wait()
		check(t, r.stop())
		if took := time.Since(begin); took > 3*time.Second {
			t.Errorf("the end took %v", took)
		}
		if err := <-answer; err == nil {
			t.Error("no error")
		}
	})
}
