package detach_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/server/detach"
)

// TestDo: a caller that waits gets the outcome. A caller that leaves gets ErrOpen, and
// its work ends all the same.
func TestDo(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var g detach.Group
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		failed := errors.New("failed")
		if got, err := detach.Do(ctx, &g, func() (int, error) { time.Sleep(30 * time.Second); return 7, failed }); got != 7 || !errors.Is(err, failed) {
			t.Errorf("waited for: %d, %v", got, err)
		}
		begin, release, ended := time.Now(), make(chan struct{}), false
		got, err := detach.Do(ctx, &g, func() (int, error) { <-release; ended = true; return 7, nil })
		if got != 0 || !errors.Is(err, detach.ErrOpen) || !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) != 30*time.Second {
			t.Errorf("left after %v: %d, %v", time.Since(begin), got, err)
		}
		close(release)
		g.Wait()
		if !ended {
			t.Error("Wait did not wait")
		}
	})
}

// TestStuck: the work of callers that have left is bounded, and new work runs when it
// has ended.
func TestStuck(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var g detach.Group
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		release, begun := make(chan struct{}), 0
		for range 5000 {
			_, err := detach.Do(gone, &g, func() (int, error) { <-release; return 0, nil })
			switch {
			case errors.Is(err, detach.ErrOpen):
				begun++
			case !errors.Is(err, detach.ErrStuck):
				t.Fatal(err)
			}
		}
		if begun != 4096 {
			t.Errorf("%d were begun", begun)
		}
		close(release)
		g.Wait()
		if got, err := detach.Do(t.Context(), &g, func() (int, error) { return 7, nil }); got != 7 || err != nil {
			t.Errorf("afterwards: %d, %v", got, err)
		}
	})
}
