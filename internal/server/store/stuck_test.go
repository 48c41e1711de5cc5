package store_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// TestStuckCommit: changes that wait for a commit that hangs fail at their deadlines and
// are not applied.
func TestStuckCommit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := open(t, newPath(t))
		defer closed(t, s)
		d := s.Deployment("default")
		release, first := make(chan struct{}), make(chan error, 1)
		go func() {
			_, err := d.UpdateAgent(t.Context(), agentID(1), func(*spireapi.Agent) (*spireapi.Agent, error) {
				<-release
				return &spireapi.Agent{ID: agentID(1)}, nil
			})
			first <- err
		}()
		synctest.Wait()
		begin := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		var all sync.WaitGroup
		for range 100 {
			all.Go(func() {
				if err := update(ctx, d, 2, "1"); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "nothing was changed") {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if took := time.Since(begin); took != time.Minute {
			t.Errorf("they failed after %v", took)
		}
		if _, err := d.Agents(t.Context()); err != nil {
			t.Errorf("read during the commit: %v", err)
		}
		close(release)
		if err := <-first; err != nil {
			t.Error(err)
		}
		if got, err := d.Agents(t.Context()); err != nil || len(got) != 1 {
			t.Errorf("%v, %v", got, err)
		}
	})
}

// TestStuckReads: reads that hang block a bounded number of threads, and other reads fail
// at their deadlines.
func TestStuckReads(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := open(t, newPath(t))
		defer closed(t, s)
		d := s.Deployment("default")
		if err := d.SaveLedger(t.Context(), ledger.Change{Put: rows(1)}); err != nil {
			t.Fatal(err)
		}
		release, hang, left := make(chan struct{}), 0, 0 // left: failed at the deadline
		var mu sync.Mutex
		var all sync.WaitGroup
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		for range 500 {
			all.Go(func() {
				_, err := d.LoadLedger(ctx, func(ledger.Row) {
					mu.Lock()
					hang++
					mu.Unlock()
					<-release
				})
				mu.Lock()
				defer mu.Unlock()
				if errors.Is(err, context.DeadlineExceeded) {
					left++
				} else if err != nil {
					t.Error(err)
				}
			})
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if hang != 64 || left != 500-64 {
			t.Errorf("%d reads hang, %d have failed", hang, left)
		}
		close(release)
		all.Wait()
		if _, err := d.LoadLedger(t.Context(), func(ledger.Row) {}); err != nil {
			t.Error(err)
		}
	})
}
