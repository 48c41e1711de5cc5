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

	"github.com/renewd/renewd/internal/cli"
)

// screen writes the timeline: a line for each event, and a progress line that is redrawn in
// place on a terminal and repeated every few seconds elsewhere. It is not safe for concurrent
// use.
type screen struct {
	w            io.Writer
	live         bool // a terminal: lines can be redrawn
	color        bool
	start        time.Time
	onWriteError func()     // called when a write fails
	width        func() int // longest line; 0 or nil: no limit

	drawn bool      // the progress line is on the screen
	last  time.Time // when progress was last written
}

const (
	redrawInterval = 100 * time.Millisecond
	repeatInterval = 5 * time.Second
)

func newScreen(w io.Writer, onWriteError func()) *screen {
	return &screen{w: w, live: cli.HasControl(w, os.Getenv), color: cli.Colored(w, os.Getenv), start: time.Now(), onWriteError: onWriteError, width: func() int { return columns(w) }}
}

func (s *screen) columns() int {
	if s.width == nil {
		return 0
	}
	return s.width()
}

// columns returns the columns of a terminal, or a readable width elsewhere.
func columns(w io.Writer) int {
	if f, ok := w.(*os.File); ok && cli.HasControl(w, os.Getenv) {
		if width, _, err := term.GetSize(int(f.Fd())); err == nil && width > 0 {
			return width
		}
	}
	return 100
}

// escapes match sequences without width.
var escapes = regexp.MustCompile("\x1b\\[[0-9;]*m")

func visible(text string) int { return utf8.RuneCountInString(escapes.ReplaceAllString(text, "")) }

// wrap breaks the rows of text between words at the terminal's width. Added rows are indented
// by from columns. It does nothing if less than minText columns are left.
func (s *screen) wrap(from int, text string) string {
	width := s.columns()
	if width < from+minText {
		return text
	}
	var out []string
	for _, row := range strings.Split(text, "\n") {
		for visible(row) > width {
			// The last space after column from that leaves the row short enough.
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

// minText is the least number of columns for wrapped text.
const minText = 20

func (s *screen) write(format string, args ...any) {
	if _, err := fmt.Fprintf(s.w, format, args...); err != nil {
		s.onWriteError()
	}
}

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

// text writes lines without time.
func (s *screen) text(lines ...string) {
	s.clear()
	for _, l := range lines {
		s.write("%s\n", s.wrap(0, l))
	}
}

// event writes the time, the part of the system and the text of an event.
func (s *screen) event(part string, lines ...string) {
	s.clear()
	s.write("%s\n", s.wrap(len(indent), fmt.Sprintf("%6.1f s  %-9s  %s", time.Since(s.start).Seconds(), part, strings.Join(lines, "\n"+indent))))
	s.last = time.Now()
}

// indent is the width of the columns before the text.
const indent = "                     "

// step announces a step with an explanation.
func (s *screen) step(n int, name string, meaning ...string) {
	s.text("")
	s.event(fmt.Sprintf("STEP %d", n), append([]string{s.paint(bold, name)}, meaning...)...)
}

// progress writes the progress line, unless it was written recently.
func (s *screen) progress(text string) {
	every := repeatInterval
	if s.live {
		every = redrawInterval
	}
	if time.Since(s.last) < every {
		return
	}
	if !s.live {
		s.event("progress", text)
		return
	}
	line := fmt.Sprintf("%6.1f s  %s", time.Since(s.start).Seconds(), text)
	// A wrapped line cannot be redrawn: parts that do not fit are omitted. Two spaces
	// separate parts. The last column stays free.
	if width := s.columns(); width > 0 && len(line) >= width {
		line = line[:width]
		line = line[:max(strings.LastIndex(line, "  "), 0)]
	}
	s.write("\r\x1b[K%s", line)
	s.drawn, s.last = true, time.Now()
}

// clear erases the progress line.
func (s *screen) clear() {
	if s.drawn {
		s.write("\r\x1b[K")
		s.drawn = false
	}
}

// bar draws part of whole.
func bar(part, whole int) string {
	const width = 12 // leaves room for the calls in 80 columns
	n := 0
	if whole > 0 {
		n = part * width / whole
	}
	return "[" + strings.Repeat("#", n) + strings.Repeat(".", width-n) + "]"
}
