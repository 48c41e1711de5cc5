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
	// lineInterval is the least time between two log lines that say the same of the
	// same.
	lineInterval = time.Minute
	// maxLines is how many different lines there are in that time. What is more is
	// counted in one line for each message.
	maxLines = 16
	// others stands in that line for what it is about.
	others = "others"
)

// Lines writes to a log what strangers can make happen as often as they like: a
// line at once, then one a minute with a count. Make it with [NewLines], and
// have [Lines.Run] write what [Lines.Note] notes.
type Lines struct {
	log  *slog.Logger
	wake chan struct{} // of capacity one

	mu    sync.Mutex
	noted map[subject]*line
}

// subject is what a line is about.
type subject struct{ message, about string }

type line struct {
	level   slog.Level
	attrs   []any // of the last time
	count   int   // times that are not written yet
	written time.Time
}

// NewLines makes a Lines that writes to log.
func NewLines(log *slog.Logger) *Lines {
	return &Lines{log: log, wake: make(chan struct{}, 1), noted: make(map[subject]*line)}
}

// Note notes that message happened to what about names, such as a client. It
// never waits. The attributes that are written are those of the last time.
func (l *Lines) Note(level slog.Level, message, about string, attrs ...any) {
	l.mu.Lock()
	s := subject{message, about}
	n, ok := l.noted[s]
	if !ok && len(l.noted) >= maxLines {
		s.about, attrs = others, nil
		n, ok = l.noted[s]
	}
	if !ok {
		n = new(line)
		l.noted[s] = n
	}
	n.level, n.attrs = level, attrs
	n.count++
	l.mu.Unlock()
	if ok {
		return
	}
	select {
	case l.wake <- struct{}{}:
	default: // it looks anyway
	}
}

// Run writes what is noted until ctx ends, and then what is left. Several may run
// at a time.
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

// write writes what is due, or all there is, and returns when to look again.
func (l *Lines) write(now time.Time, all bool) (next time.Duration) {
	due := make(map[subject]line)
	next = lineInterval
	l.mu.Lock()
	for s, n := range l.noted {
		wait := lineInterval - now.Sub(n.written)
		switch {
		case n.count > 0 && (all || wait <= 0):
			due[s] = *n
			n.count, n.written = 0, now
		case wait <= 0:
			delete(l.noted, s)
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
