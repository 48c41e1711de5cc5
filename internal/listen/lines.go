package listen

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// logInterval is the least time between two log lines with the same message
	// about the same subject.
	logInterval = time.Minute
	// maxLines is how many different lines are kept for that time. Further ones are
	// counted together, in one line for each message.
	maxLines = 16
	// others is the subject of those.
	others = "others"
)

// Lines limits log lines that remote clients can cause at any rate: the first is
// written at once, then one a minute with a count. Make it with [NewLines];
// [Lines.Run] writes the lines that [Lines.Note] adds.
type Lines struct {
	log  *slog.Logger
	wake chan struct{} // of capacity one

	mu      sync.Mutex
	pending map[subject]*line
}

// subject identifies lines that are counted together.
type subject struct{ message, about string }

type line struct {
	level   slog.Level
	attrs   []any // of the last Note
	count   int   // since the last write
	written time.Time
}

// NewLines makes a Lines that writes to log.
func NewLines(log *slog.Logger) *Lines {
	return &Lines{log: log, wake: make(chan struct{}, 1), pending: make(map[subject]*line)}
}

// Note adds a line with a message about something, such as a client. It never waits.
// The line is written with the attributes of the last Note.
func (l *Lines) Note(level slog.Level, message, about string, attrs ...any) {
	l.mu.Lock()
	s := subject{message, about}
	n, ok := l.pending[s]
	if !ok && len(l.pending) >= maxLines {
		s.about, attrs = others, nil
		n, ok = l.pending[s]
	}
	if !ok {
		n = new(line)
		l.pending[s] = n
	}
	n.level, n.attrs = level, attrs
	n.count++
	l.mu.Unlock()
	if ok {
		return
	}
	select {
	case l.wake <- struct{}{}:
	default: // Run is about to write
	}
}

// Run writes lines until ctx ends, and then the rest. Several may run at a time.
func (l *Lines) Run(ctx context.Context) {
	for {
		next := l.write(time.Now(), false)
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
			timer.Stop()
			l.write(time.Now(), true)
			return
		case <-l.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// write writes the lines that are due, or all, and returns when the next is due.
func (l *Lines) write(now time.Time, all bool) (next time.Duration) {
	due := make(map[subject]line)
	next = logInterval
	l.mu.Lock()
	for s, n := range l.pending {
		wait := logInterval - now.Sub(n.written)
		switch {
		case n.count > 0 && (all || wait <= 0):
			due[s] = *n
			n.count, n.written = 0, now
		case wait <= 0:
			delete(l.pending, s)
		default:
			next = min(next, wait)
		}
	}
	l.mu.Unlock()
	order := func(a, b subject) int { return strings.Compare(a.message+a.about, b.message+b.about) }
	for _, s := range slices.SortedFunc(maps.Keys(due), order) {
		n := due[s]
		l.log.Log(context.Background(), n.level, s.message, append(slices.Clone(n.attrs), "count", n.count)...)
	}
	return next
}
