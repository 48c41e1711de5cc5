package cli

import (
	"os"
	"strings"

	"github.com/rivo/uniseg"
	"golang.org/x/term"
)

// Ellipsis stands for what [Shorten] and [ShortenMiddle] leave out. PlainEllipsis is for
// terminals without UTF-8.
const (
	Ellipsis      = "…"
	PlainEllipsis = "..."
)

// Width returns the columns that a line of text takes on a terminal. A character may have
// several code points, and take no column, one or two (Unicode Standard Annexes 11 and 29).
func Width(s string) int { return uniseg.StringWidth(s) }

// Shorten returns s in at most width columns. If it leaves out the end, the result ends
// with the ellipsis. It splits no character.
func Shorten(s string, width int, ellipsis string) string {
	if Width(s) <= width {
		return s
	}
	return head(s, width-Width(ellipsis)) + head(ellipsis, width)
}

// ShortenMiddle is [Shorten], but leaves out the middle: IDs differ at the end.
func ShortenMiddle(s string, width int, ellipsis string) string {
	if Width(s) <= width {
		return s
	}
	left := width - Width(ellipsis)
	if left < 2 {
		return Shorten(s, width, ellipsis)
	}
	before := head(s, left/2)
	rest := s[len(before):]
	for left -= Width(before); Width(rest) > left; {
		_, rest, _, _ = uniseg.FirstGraphemeClusterInString(rest, -1)
	}
	return before + ellipsis + rest
}

// head returns the first characters of s, at most width columns.
func head(s string, width int) string {
	rest, used := s, 0
	for state := -1; rest != ""; {
		_, after, columns, next := uniseg.FirstGraphemeClusterInString(rest, state)
		if used += columns; used > width {
			break
		}
		rest, state = after, next
	}
	return s[:len(s)-len(rest)]
}

// pad appends spaces up to width columns.
func pad(s string, width int) string {
	return s + strings.Repeat(" ", max(0, width-Width(s)))
}

// TerminalSize returns a function for the present size of the terminal. The function is
// nil if text on the stream cannot be redrawn; its results are zero if the size is not known.
func TerminalSize(stream any, getenv func(string) string) func() (columns, rows int) {
	f, ok := stream.(*os.File)
	if !ok || !HasControl(f, getenv) {
		return nil
	}
	return func() (int, int) { return size(f) }
}

func size(f *os.File) (columns, rows int) {
	columns, rows, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return 0, 0
	}
	return columns, rows
}

// UTF8 reports whether the locale of the environment has UTF-8 (locale(7)).
func UTF8(getenv func(string) string) bool {
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if locale := strings.ToLower(getenv(name)); locale != "" {
			return strings.Contains(locale, "utf-8") || strings.Contains(locale, "utf8")
		}
	}
	return false
}
