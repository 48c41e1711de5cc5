// Package loglimit keeps log lines from repeating without end: about what callers do, and
// about what fails at each attempt.
package loglimit

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"
)

const (
	// Interval is the usual interval of a [Log].
	Interval = 10 * time.Minute
	// others is the subject of the lines that exceed the number of subjects.
	others = "others"
)

// Log writes lines that may repeat. The first line with a message about a subject is
// written at once. While it repeats, one an interval is written, with the number of lines
// that it stands for. All others are written at debug level. It is safe for concurrent
// use. Make it with [New].
type Log struct {
	log      *slog.Logger
	interval time.Duration
	most     int

	mu      sync.Mutex // not held while a line is written
	lines   map[subject]*line
	running int    // calls of Run
	waiting []line // for Run
	wake    chan struct{}
}

// subject identifies lines that are counted together.
type subject struct{ about, message string }

type line struct {
	subject
	level   slog.Level
	attrs   []any     // of the last Note
	count   int       // since the last one written
	since   time.Time // of the first Note
	written time.Time
}

// New returns a Log that writes to log. It distinguishes so many subjects at a time.
// Lines about further ones are counted together, one line for each message, and have no
// attributes.
func New(log *slog.Logger, interval time.Duration, most int) *Log {
	return &Log{log: log, interval: interval, most: most, lines: make(map[subject]*line), wake: make(chan struct{}, 1)}
}

// Note notes a line with a message about something, such as a client. It does not wait for
// the log while [Log.Run] runs, except at debug level.
func (l *Log) Note(level slog.Level, message, about string, attrs ...any) {
	now := time.Now()
	s := subject{about, message}
	var out []line
	l.mu.Lock()
	if _, known := l.lines[s]; !known && len(l.lines) >= l.most {
		if out = l.takeLocked(now, l.interval); len(l.lines) >= l.most {
			s.about, attrs = others, nil
		}
	}
	n := l.lines[s]
	if n == nil {
		n = &line{subject: s, since: now}
		l.lines[s] = n
	}
	n.level, n.attrs = level, attrs
	n.count++
	if now.Sub(n.written) >= l.interval {
		out = append(out, *n)
		n.count, n.written = 0, now
	} else {
		out = append(out, line{subject: s, level: slog.LevelDebug, attrs: attrs})
	}
	if l.running > 0 && out[len(out)-1].level != slog.LevelDebug {
		l.waiting, out = append(l.waiting, out...), nil
		select {
		case l.wake <- struct{}{}:
		default: // Run is about to write
		}
	}
	l.mu.Unlock()
	l.write(out)
}

// Over forgets what was noted about something. If there was anything, it writes a line at
// level info, with the time since the first one; none if the message is empty.
func (l *Log) Over(about, message string, attrs ...any) {
	var first time.Time
	l.mu.Lock()
	for s, n := range l.lines {
		if s.about != about {
			continue
		}
		if first.IsZero() || n.since.Before(first) {
			first = n.since
		}
		delete(l.lines, s)
	}
	l.mu.Unlock()
	if message != "" && !first.IsZero() {
		l.log.Info(message, append(slices.Clone(attrs), "duration", time.Since(first).Round(time.Millisecond).String())...)
	}
}

// Run writes the lines of [Log.Note], and the counts of lines that no longer repeat, until
// ctx ends, and then the rest. Several may run at a time. A Log whose lines all end with
// [Log.Over], and may wait for the log, does not need it.
func (l *Log) Run(ctx context.Context) {
	tick := time.NewTicker(l.interval)
	defer tick.Stop()
	l.mu.Lock()
	l.running++
	l.mu.Unlock()
	for ctx.Err() == nil {
		var counts []line
		select {
		case <-l.wake:
			l.mu.Lock()
		case <-tick.C:
			l.mu.Lock()
			counts = l.takeLocked(time.Now(), l.interval)
		case <-ctx.Done():
			l.mu.Lock()
			l.running--
			counts = l.takeLocked(time.Now(), 0)
		}
		slices.SortFunc(counts, func(a, b line) int { return cmp.Or(cmp.Compare(a.message, b.message), cmp.Compare(a.about, b.about)) })
		due := append(l.waiting, counts...)
		l.waiting = nil
		l.mu.Unlock()
		l.write(due)
	}
}

// takeLocked returns the lines last written so long ago that have a count, and forgets
// those without one.
func (l *Log) takeLocked(now time.Time, age time.Duration) (due []line) {
	for s, n := range l.lines {
		switch {
		case now.Sub(n.written) < age:
		case n.count == 0:
			delete(l.lines, s)
		default:
			due = append(due, *n)
			n.count, n.written = 0, now
		}
	}
	return due
}

func (l *Log) write(lines []line) {
	for _, n := range lines {
		attrs := n.attrs
		if n.count > 1 {
			attrs = append(slices.Clone(attrs), "count", n.count)
		}
		l.log.Log(context.Background(), n.level, n.message, attrs...)
	}
}
