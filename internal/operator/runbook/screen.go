package runbook

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/renewd/renewd/internal/cli"
)

// progressInterval is the least time between two progress lines that are not redrawn.
const progressInterval = 10 * time.Second

// redrawInterval is the time between two drawings. It makes good within a second what a
// resized terminal does to a block.
const redrawInterval = time.Second

// Screen writes progress: on a terminal a block of lines that is redrawn in place,
// elsewhere a line every ten seconds. The zero Screen writes nothing. It replaces
// control characters and is not safe for concurrent use.
type Screen struct {
	W io.Writer
	// Size returns the present columns and rows of the terminal. If it is nil, or a
	// result is not positive, nothing is redrawn.
	Size func() (columns, rows int)
	// Plain is for terminals without UTF-8: blocks have ASCII characters.
	Plain bool

	drawn       bool // a block is on the screen
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

// Clear erases the block. Call it before you write to the terminal otherwise.
func (s *Screen) Clear() {
	if s != nil && s.drawn {
		_, _ = fmt.Fprint(s.W, "\r"+eraseBelow)
		s.drawn = false
	}
}

// Progress writes text as a progress line, on one line. A line of another kind than the
// last is written without waiting for the ten seconds.
func (s *Screen) Progress(kind, text string, now time.Time) {
	if s == nil || s.W == nil {
		return
	}
	if kind != s.lastKind || now.Sub(s.lastPrinted) >= progressInterval {
		_, _ = fmt.Fprintln(s.W, cli.Printable(text))
		s.lastPrinted, s.lastKind = now, kind
	}
}

// size returns the terminal's size; ok is false if blocks cannot be redrawn.
func (s *Screen) size() (columns, rows int, ok bool) {
	if s == nil || s.W == nil || s.Size == nil {
		return 0, 0, false
	}
	columns, rows = s.Size()
	return columns, rows, columns > 0 && rows > 0
}

// Control sequences (ECMA-48; DECAWM, which terminals have from the VT100).
const (
	eraseLine  = "\x1b[K" // from the cursor
	eraseBelow = "\x1b[J" // from the cursor
	wrapOff    = "\x1b[?7l"
	wrapOn     = "\x1b[?7h"
)

// draw shows lines in place of the last block. The cursor stays at the block's beginning:
// whatever a resized terminal does to the lines below, the next drawing begins there. It
// writes at most as many lines as the terminal has, because others would scroll.
func (s *Screen) draw(lines []string, rows int) {
	lines = lines[:min(len(lines), rows)]
	var b strings.Builder
	b.WriteString(wrapOff + "\r")
	for i, line := range lines {
		if i > 0 {
			b.WriteString("\r\n")
		}
		// Erased before: a line that fills the terminal leaves the cursor on its last
		// character.
		erase := eraseLine
		if i == len(lines)-1 {
			erase = eraseBelow
		}
		b.WriteString(erase + cli.Printable(line))
	}
	b.WriteString(wrapOn + "\r")
	if up := len(lines) - 1; up > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", up)
	}
	_, _ = io.WriteString(s.W, b.String())
	s.drawn = true
}
