package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"
)

// screen writes the timeline: one line for each event, and one line of
// progress that is redrawn in place on a terminal and repeated every few
// seconds elsewhere. It is used from one goroutine.
type screen struct {
	w     io.Writer
	live  bool // a terminal: lines can be redrawn
	color bool
	start time.Time
	gone  func() // called when a write fails: nobody reads any more

	drawn bool      // the progress line stands at the bottom
	last  time.Time // when progress was last written
}

const (
	redrawEvery = 100 * time.Millisecond
	repeatEvery = 5 * time.Second
)

func newScreen(w io.Writer, gone func()) *screen {
	return &screen{w: w, live: isTerminal(w), color: colored(w), start: time.Now(), gone: gone}
}

func (s *screen) write(format string, args ...any) {
	if _, err := fmt.Fprintf(s.w, format, args...); err != nil {
		s.gone()
	}
}

// isTerminal reports whether w is a terminal that knows control sequences.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd())) && os.Getenv("TERM") != "dumb"
}

// colored reports whether to use color: only on a terminal, and not when
// NO_COLOR is set to anything (no-color.org).
func colored(w io.Writer) bool { return isTerminal(w) && os.Getenv("NO_COLOR") == "" }

// The colors, as parameters of the SGR sequence (ECMA-48, 8.3.117).
const (
	bold  = "1"
	red   = "31"
	green = "32"
)

func (s *screen) paint(color, text string) string {
	if !s.color {
		return text
	}
	return "\x1b[" + color + "m" + text + "\x1b[0m"
}

// text writes lines that are no events.
func (s *screen) text(lines ...string) {
	s.clear()
	for _, l := range lines {
		s.write("%s\n", l)
	}
}

// event writes when something happened, to whom, and what; more lines of what
// follow below the first.
func (s *screen) event(who string, what ...string) {
	s.clear()
	s.write("%6.1f s  %-9s  %s\n", time.Since(s.start).Seconds(), who, strings.Join(what, "\n"+indent))
	s.last = time.Now() // what has just been said need not be repeated
}

// indent is the width of the columns before what happened.
const indent = "                     "

// step announces a step and says what it means.
func (s *screen) step(n int, name string, meaning ...string) {
	s.text("")
	s.event(fmt.Sprintf("STEP %d", n), append([]string{s.paint(bold, name)}, meaning...)...)
}

// progress says how far things are, when it is time to say it again.
func (s *screen) progress(what string) {
	every := repeatEvery
	if s.live {
		every = redrawEvery
	}
	if time.Since(s.last) < every {
		return
	}
	if !s.live {
		s.event("progress", what)
		return
	}
	line := fmt.Sprintf("%6.1f s  %s", time.Since(s.start).Seconds(), what)
	if f, ok := s.w.(*os.File); ok {
		// A line that is wrapped cannot be redrawn.
		if width, _, err := term.GetSize(int(f.Fd())); err == nil && width > 0 && len(line) >= width {
			line = line[:width-1]
		}
	}
	s.write("\r\x1b[K%s", line)
	s.drawn, s.last = true, time.Now()
}

// clear takes the progress line away.
func (s *screen) clear() {
	if s.drawn {
		s.write("\r\x1b[K")
		s.drawn = false
	}
}

// bar draws part of whole.
func bar(part, whole int) string {
	const width = 20
	n := 0
	if whole > 0 {
		n = part * width / whole
	}
	return "[" + strings.Repeat("#", n) + strings.Repeat(".", width-n) + "]"
}
