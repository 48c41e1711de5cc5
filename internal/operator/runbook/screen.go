package runbook

import (
	"fmt"
	"io"
	"time"

	"github.com/renewd/renewd/internal/cli"
)

// progressInterval is the least time between two progress lines that are not redrawn.
const progressInterval = 10 * time.Second

// Screen writes progress: on a terminal one line that is redrawn in place,
// elsewhere a line every ten seconds. The zero Screen writes nothing. It replaces
// control characters and is not safe for concurrent use.
type Screen struct {
	W io.Writer
	// Width returns the terminal's columns. If it is nil, or its result is not
	// positive, W is not a terminal.
	Width func() int

	drawn       bool // the progress line is on the screen
	lastPrinted time.Time
	lastKind    string
}

// Line writes a line that is not redrawn.
func (s *Screen) Line(text string) {
	if s == nil || s.W == nil {
		return
	}
	s.Clear()
	_, _ = fmt.Fprintln(s.W, cli.PrintableLines(text))
}

// Clear erases the progress line. Call it before you write to the terminal otherwise.
func (s *Screen) Clear() {
	if s != nil && s.drawn {
		_, _ = fmt.Fprint(s.W, "\r\x1b[K")
		s.drawn = false
	}
}

// Progress shows text as the progress line. Where it is not redrawn, a line of another
// kind than the last is written without waiting for the ten seconds.
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
		if kind != s.lastKind || now.Sub(s.lastPrinted) >= progressInterval {
			_, _ = fmt.Fprintln(s.W, text)
			s.lastPrinted, s.lastKind = now, kind
		}
		return
	}
	// A line that is wrapped cannot be redrawn.
	if line := []rune(text); len(line) >= width {
		text = string(line[:width-1])
	}
	_, _ = fmt.Fprintf(s.W, "\r\x1b[K%s", text)
	s.drawn, s.lastKind = true, kind
}
