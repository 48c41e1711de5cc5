package loglimit_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/loglimit"
)

// lines is a log whose lines a test can read.
type lines struct {
	level slog.Level
	mu    sync.Mutex
	buf   bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) limited() *loglimit.Log {
	return loglimit.New(slog.New(slog.NewJSONHandler(l, &slog.HandlerOptions{Level: l.level})), time.Minute, 16)
}

// take returns the lines since the last take.
func (l *lines) take(t *testing.T) (out []map[string]any) {
	t.Helper()
	synctest.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.buf.String()) {
		var rec map[string]any
		if err := json.Unmarshal([]byte(line), &rec); err != nil {
			t.Fatal(err)
		}
		out = append(out, rec)
	}
	l.buf.Reset()
	return out
}

// A repeated event is logged at once and then once an interval, and the counts include all
// of them.
func TestRepeatedLines(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var log lines
		l := log.limited()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); l.Run(ctx) }()

		l.Note(slog.LevelWarn, "call refused", "a", "address", "a")
		if got := log.take(t); len(got) != 1 || got[0]["count"] != nil || got[0]["address"] != "a" || got[0]["level"] != "WARN" {
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
		if got := log.take(t); len(got) != 1 || got[0]["count"] != 5000.0 || got[0]["level"] != "WARN" {
			t.Errorf("after a minute: %v", got)
		}
		time.Sleep(3 * time.Minute)
		l.Note(slog.LevelInfo, "call refused", "a")
		if got := log.take(t); len(got) != 1 || got[0]["count"] != nil {
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
			n, several := line["count"].(float64)
			if !several {
				n = 1
			}
			total += n
		}
		if len(got) > 2*17 || total != 5000 {
			t.Errorf("5000 clients: %d lines that count %v", len(got), total)
		}
	})
}

// Run writes the remaining counts when it ends.
func TestRunWritesTheRest(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var log lines
		l := log.limited()
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

// A failure is logged once an interval while it lasts, and its end once, with the time
// that it took. The next one is logged at once.
func TestOver(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var log lines
		l := log.limited()
		fail := func() { l.Note(slog.LevelWarn, "sync failed", "sync", "error", "timeout") }
		l.Over("sync", "sync recovered")
		if got := log.take(t); got != nil {
			t.Errorf("before any failure: %v", got)
		}
		for range 9 {
			fail()
			time.Sleep(10 * time.Second)
		}
		if got := log.take(t); len(got) != 2 || got[0]["count"] != nil || got[1]["count"] != 6.0 || got[1]["error"] != "timeout" {
			t.Errorf("90 s of failures: %v", got)
		}
		l.Over("another", "another recovered")
		l.Over("sync", "sync recovered", "path", "/x")
		l.Over("sync", "sync recovered")
		if got := log.take(t); len(got) != 1 || got[0]["level"] != "INFO" || got[0]["msg"] != "sync recovered" || got[0]["duration"] != "1m30s" || got[0]["path"] != "/x" {
			t.Errorf("when it is over: %v", got)
		}
		fail()
		if got := log.take(t); len(got) != 1 || got[0]["count"] != nil {
			t.Errorf("the next failure: %v", got)
		}
		l.Over("sync", "")
		fail()
		if got := log.take(t); len(got) != 1 || got[0]["msg"] != "sync failed" {
			t.Errorf("after an end without a line: %v", got)
		}
	})
}

// Lines that repeat are written at debug level.
func TestDebugLevel(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		log := lines{level: slog.LevelDebug}
		l := log.limited()
		for i := range 3 {
			l.Note(slog.LevelWarn, "sync failed", "", "attempt", i)
		}
		got := log.take(t)
		if len(got) != 3 || got[0]["level"] != "WARN" || got[2]["level"] != "DEBUG" || got[2]["attempt"] != 2.0 || got[2]["count"] != nil {
			t.Errorf("lines %v", got)
		}
	})
}

// Without Run, subjects that no longer repeat make room for others, and their counts are
// written then.
func TestOldSubjectsMakeRoom(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var log lines
		l := log.limited()
		note := func(about int) {
			l.Note(slog.LevelWarn, "call refused", fmt.Sprint(about), "address", about)
		}
		for i := range 16 {
			note(i)
		}
		note(0)
		note(0)
		log.take(t)
		time.Sleep(time.Minute)
		note(100)
		if got := log.take(t); len(got) != 2 || got[0]["address"] != 0.0 || got[0]["count"] != 2.0 || got[1]["address"] != 100.0 {
			t.Errorf("lines %v", got)
		}
	})
}

// stuck is a log that nobody reads.
type stuck chan struct{}

func (s stuck) Write(p []byte) (int, error) {
	<-s
	return len(p), nil
}

// While Run runs, who notes a line does not wait for a log that is stuck.
func TestStuckLog(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		log := make(stuck)
		l := loglimit.New(slog.New(slog.NewJSONHandler(log, nil)), time.Minute, 16)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); l.Run(ctx) }()
		synctest.Wait()
		noted := make(chan struct{})
		go func() {
			defer close(noted)
			for i := range 100 {
				l.Note(slog.LevelWarn, "call refused", fmt.Sprint(i%20))
			}
		}()
		synctest.Wait()
		select {
		case <-noted:
		default:
			t.Error("Note waits for the log")
		}
		cancel()
		close(log)
		<-noted
		<-done
	})
}
