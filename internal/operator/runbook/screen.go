package runbook

import (
	"fmt"
	"io"
	"time"

	"github.com/renewd/renewd/internal/cli"
)

// repeatEvery is how often progress is said where it cannot be redrawn.
const repeatEvery = 10 * time.Second

// Screen is where progress is written: one line that is redrawn in place on a
// terminal, and a line every ten seconds elsewhere. The zero Screen is silent.
// It is used from one goroutine. Text from elsewhere is written as
// [cli.PrintableLines] leaves it.
type Screen struct {
	W io.Writer
	// Width is the number of columns of the terminal; nil or not positive: W
	// is none.
	Width func() int

	drawn bool // the progress line stands at the bottom
	said  time.Time
	kind  string
}

// Line writes a line that stays.
func (s *Screen) Line(text string) {
	if s == nil || s.W == nil {
		return
	}
	s.Clear()
	_, _ = fmt.Fprintln(s.W, cli.PrintableLines(text))
}

// Clear takes the progress line away, before something else is written to the
// terminal.
func (s *Screen) Clear() {
	if s != nil && s.drawn {
		_, _ = fmt.Fprint(s.W, "\r\x1b[K")
		s.drawn = false
	}
}

// Progress says how far things are. A line of another kind than the last, such
// as a failure, is said at once.
func (s *Screen) Progress(kind, text string, now time.Time) {
	if s == nil || s.W == nil {
		return
	}
	text = cli.Printable(text) // a line feed could not be redrawn
	width := 0
	if s.Width != nil {
		width = s.Width()
	}
	if width <= 0 {
		if kind != s.kind || now.Sub(s.said) >= repeatEvery {
			_, _ = fmt.Fprintln(s.W, text)
			s.said, s.kind = now, kind
		}
		return
	}
	// A line that is wrapped cannot be redrawn.
	if line := []rune(text); len(line) >= width {
		text = string(line[:width-1])
	}
	_, _ = fmt.Fprintf(s.W, "\r\x1b[K%s", text)
	s.drawn, s.kind = true, kind
}
