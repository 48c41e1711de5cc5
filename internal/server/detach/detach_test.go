package detach_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/server/detach"
)

// TestDo: who waits gets the outcome; who leaves is told that it is open, and the work
// ends as if it had been waited for.
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

// TestStuck: who leaves without end does not pile up work, and all is well when it has
// ended.
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
