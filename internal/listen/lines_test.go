package listen_test

import (
	"context"
	"fmt"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/listen"
)

// TestLines: a repeated event is logged at once and then once a minute, and the counts
// include all of them.
func TestLines(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var log lines
		l := listen.NewLines(log.logger())
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); l.Run(ctx) }()

		l.Note(slog.LevelWarn, "call refused", "a", "address", "a")
		if got := log.take(t); len(got) != 1 || got[0]["count"] != 1.0 || got[0]["address"] != "a" || got[0]["level"] != "WARN" {
			t.Errorf("the first time: %v", got)
		}
		for range 5000 {
			l.Note(slog.LevelWarn, "call refused", "a", "address", "a")
		}
		l.Note(slog.LevelWarn, "call refused", "b")
		if got := log.take(t); len(got) != 1 || got[0]["address"] != nil {
			t.Errorf("repeated at once, and another subject: %v", got)
		}
		time.Sleep(time.Minute)
		if got := log.take(t); len(got) != 1 || got[0]["count"] != 5000.0 {
			t.Errorf("after a minute: %v", got)
		}
		time.Sleep(3 * time.Minute)
		l.Note(slog.LevelInfo, "call refused", "a")
		if got := log.take(t); len(got) != 1 || got[0]["count"] != 1.0 {
			t.Errorf("after a pause: %v", got)
		}
		time.Sleep(3 * time.Minute)
		for i := range 5000 {
			l.Note(slog.LevelWarn, "call refused", fmt.Sprint(i), "address", i)
		}
		time.Sleep(time.Minute)
		cancel()
		<-done
		total, got := 0.0, log.take(t)
		for _, line := range got {
			total += line["count"].(float64)
		}
		if len(got) > 2*17 || total != 5000 {
			t.Errorf("5000 clients: %d lines that count %v", len(got), total)
		}
	})
}

// TestLinesAtTheEnd: Run writes the remaining counts when it ends.
func TestLinesAtTheEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var log lines
		l := listen.NewLines(log.logger())
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); l.Run(ctx) }()
		for range 3 {
			l.Note(slog.LevelWarn, "call refused", "a")
			synctest.Wait()
		}
		cancel()
		<-done
		if got := log.take(t); len(got) != 2 || got[1]["count"] != 2.0 {
			t.Errorf("lines %v", got)
		}
	})
}
