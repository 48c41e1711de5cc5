package spireapi_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

// hungDisk is a storage on a disk that can hang, whatever the caller's deadline is.
type hungDisk struct {
	*memory.Server
	mu   sync.Mutex
	gate chan struct{} // nil: it does not hang
}

func (s *hungDisk) set(gate chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gate = gate
}

func (s *hungDisk) wait() {
	s.mu.Lock()
	gate := s.gate
	s.mu.Unlock()
	if gate != nil {
		<-gate
	}
}

func (s *hungDisk) Token(ctx context.Context, value string) (spireapi.Token, error) {
	s.wait()
	return s.Server.Token(ctx, value)
}

func (s *hungDisk) Admit(ctx context.Context, a spireapi.Admission) error {
	s.wait()
	return s.Server.Admit(ctx, a)
}

func (s *hungDisk) Agent(ctx context.Context, id spiffeid.ID) (*spireapi.Agent, error) {
	s.wait()
	return s.Server.Agent(ctx, id)
}

func (s *hungDisk) UpdateAgent(ctx context.Context, id spiffeid.ID, change func(*spireapi.Agent) (*spireapi.Agent, error), audit ...*spireapi.AuditRecord) (*spireapi.Agent, error) {
	s.wait()
	return s.Server.UpdateAgent(ctx, id, change, audit...)
}

// TestStuckDisk: a call that signs ends by its caller's deadline, or with its
// connection, if storage or the ledger hangs. Its work ends when the disk answers.
func TestStuckDisk(t *testing.T) {
	t.Parallel()
	for what := range map[string]bool{"storage": true, "ledger": true} {
		for name, call := range signing {
			for _, deadline := range []bool{true, false} {
				when := map[bool]string{true: "with a deadline", false: "without"}[deadline]
				t.Run(what+"/"+name+"/"+when, func(t *testing.T) {
					t.Parallel()
					synctest.Test(t, func(t *testing.T) { stuckDisk(t, what, call, deadline) })
				})
			}
		}
	}
}

func stuckDisk(t *testing.T, what string, call func(context.Context, *testing.T, *running, *client) (any, error), deadline bool) {
	disk, b := &hungDisk{Server: memory.NewServer()}, newFakeLedger()
	var serving atomic.Int64
	s := start(t, spireapi.Config{Storage: disk, Ledger: b, Options: []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			serving.Add(1)
			defer serving.Add(-1)
			return handler(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
			serving.Add(1)
			defer serving.Add(-1)
			return handler(srv, stream)
		}),
	}})
	_, c := s.join(t)
	s.apply(t, []spireapi.Entry{entry("a")})
	gate := make(chan struct{})
	if what == "storage" {
		disk.set(gate)
	} else {
		b.set(func(context.Context) error { <-gate; return nil })
	}
	ctx, limit := t.Context(), 4*time.Minute+30*time.Second // a connection's age, with some jitter
	if deadline {
		var cancel func()
		ctx, cancel = context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		limit = 30 * time.Second
	}
	begin := time.Now()
	got, err := call(ctx, t, s, c)
	if took := time.Since(begin); got != nil || err == nil || took > limit {
		t.Errorf("after %v: %v, %v", took, got, err)
	}
	if deadline {
		wantCode(t, err, codes.DeadlineExceeded)
	}
	synctest.Wait()
	if n := serving.Load(); n != 0 {
		t.Errorf("%d calls are still served", n)
	}
	// Calls that need no storage are answered, and Serve returns.
	if what == "storage" {
		_, err := s.dial(t, nil).attest(t.Context(), "x509pop", "x", []byte("x"))
		wantCode(t, err, codes.FailedPrecondition)
	}
	s.stop()
	disk.set(nil)
	close(gate)
	s.Wait()
	if signing, _ := b.state(); signing != 0 {
		t.Errorf("%d calls are signing when the disk answers", signing)
	}
}

func (s *hungDisk) PutEntries(ctx context.Context, put []spireapi.StoredEntry, gone []string, audit ...*spireapi.AuditRecord) error {
	s.wait()
	return s.Server.PutEntries(ctx, put, gone, audit...)
}

// TestEntriesBehindAStuckDisk: a writer that waits for another change of entries
// returns in time.
func TestEntriesBehindAStuckDisk(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		disk := &hungDisk{Server: memory.NewServer()}
		s := start(t, spireapi.Config{Storage: disk})
		gate, first := make(chan struct{}), make(chan error, 1)
		disk.set(gate)
		go func() {
			_, err := s.UpsertEntry(t.Context(), entry("a"))
			first <- err
		}()
		synctest.Wait()
		begin := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := s.UpsertEntry(ctx, entry("b")); !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) != time.Minute {
			t.Errorf("after %v: %v", time.Since(begin), err)
		}
		disk.set(nil)
		close(gate)
		check(t, <-first)
		if got := s.Entries(); len(got) != 1 || got[0].ID != "a" {
			t.Errorf("entries %v", got)
		}
	})
}
