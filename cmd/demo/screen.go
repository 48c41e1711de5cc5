package main

import (
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"time"
	"unicode/utf8"

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
	gone  func()     // called when a write fails: nobody reads any more
	width func() int // how long lines may be; 0 or nil: any length

	drawn bool      // the progress line stands at the bottom
	last  time.Time // when progress was last written
}

const (
	redrawEvery = 100 * time.Millisecond
	repeatEvery = 5 * time.Second
)

func newScreen(w io.Writer, gone func()) *screen {
	return &screen{w: w, live: isTerminal(w), color: colored(w), start: time.Now(), gone: gone, width: func() int { return columns(w) }}
}

func (s *screen) columns() int {
	if s.width == nil {
		return 0
	}
	return s.width()
}

// columns is how many a terminal has, and what is good to read elsewhere.
func columns(w io.Writer) int {
	if f, ok := w.(*os.File); ok && isTerminal(w) {
		if width, _, err := term.GetSize(int(f.Fd())); err == nil && width > 0 {
			return width
		}
	}
	return 100
}

// escapes are sequences that take no column.
var escapes = regexp.MustCompile("\x1b\\[[0-9;]*m")

func visible(text string) int { return utf8.RuneCountInString(escapes.ReplaceAllString(text, "")) }

// wrap breaks the rows of text between words, so that none is longer than the
// terminal is wide: it would break them in mid-word. The rows that this adds begin
// below the column from. On a terminal with hardly more than that it does nothing.
func (s *screen) wrap(from int, text string) string {
	width := s.columns()
	if width < from+minText {
		return text
	}
	var out []string
	for _, row := range strings.Split(text, "\n") {
		for visible(row) > width {
			// The last space that leaves a row short enough, behind what is in front of
			// the column.
			at := -1
			for i, r := range row {
				if used := visible(row[:i]); r == ' ' && used > from && used <= width {
					at = i
				}
			}
			if at < 0 {
				break // one long word
			}
			out = append(out, strings.TrimRight(row[:at], " "))
			row = strings.Repeat(" ", from) + strings.TrimLeft(row[at:], " ")
		}
		out = append(out, row)
	}
	return strings.Join(out, "\n")
}

// minText is the least room for text that is worth wrapping.
const minText = 20

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
		s.write("%s\n", s.wrap(0, l))
	}
}

// event writes when something happened, to whom, and what; more lines of what
// follow below the first.
func (s *screen) event(who string, what ...string) {
	s.clear()
	s.write("%s\n", s.wrap(len(indent), fmt.Sprintf("%6.1f s  %-9s  %s", time.Since(s.start).Seconds(), who, strings.Join(what, "\n"+indent))))
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
	// A line that is wrapped cannot be redrawn: of what stands between two spaces that
	// is left out which does not fit. The last column stays free.
	if width := s.columns(); width > 0 && len(line) >= width {
		line = line[:width]
		line = line[:max(strings.LastIndex(line, "  "), 0)]
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
	const width = 12 // so that the calls beside it fit into 80 columns
	n := 0
	if whole > 0 {
		n = part * width / whole
	}
	return "[" + strings.Repeat("#", n) + strings.Repeat(".", width-n) + "]"
}
