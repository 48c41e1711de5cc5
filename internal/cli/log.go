package cli

import (
	"io"
	"log/slog"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/lmittmann/tint"
	"golang.org/x/term"
)

// LogFormats are the values of the format that NewLog takes.
var LogFormats = []string{"auto", "text", "json"}

// NewLog returns a daemon's log. Format auto means text on a terminal and
// JSON otherwise. Text is colored only on a terminal and not when NO_COLOR is
// set to anything (no-color.org). What goes to systemd's journal has the
// journal's priorities.
func NewLog(w io.Writer, level slog.Level, format string, getenv func(string) string) *slog.Logger {
	if toJournal(w, getenv) {
		l := &line{w: w}
		return slog.New(journal{newHandler(l, level, format, getenv), l})
	}
	return slog.New(newHandler(w, level, format, getenv))
}

func newHandler(w io.Writer, level slog.Level, format string, getenv func(string) string) slog.Handler {
	terminal := IsTerminal(w)
	if format == "json" || (format == "auto" && !terminal) {
		return slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level, ReplaceAttr: spelledOut})
	}
	return NewTextHandler(w, level, time.TimeOnly, terminal && getenv("NO_COLOR") == "")
}

// NewTextHandler returns a handler that writes a log for people. Text from
// elsewhere reaches w as [PrintableLines] leaves it.
func NewTextHandler(w io.Writer, level slog.Level, timeFormat string, color bool) slog.Handler {
	return tint.NewTextHandler(w, &tint.Options{
		Level: level, TimeFormat: timeFormat, NoColor: !color, ReplaceAttr: printable,
	})
}

// unlikeTint replaces what tint 1.2.1 does not write as it is: in color, a
// spelled-out \x1b in a quoted value becomes an escape character; without color,
// a value ends before the first U+FFFD.
var unlikeTint = strings.NewReplacer(`\x1b`, `\x1B`, string(utf8.RuneError), "?")

// printable leaves values that hold no text, and the record's level, as they are.
func printable(_ []string, a slog.Attr) slog.Attr {
	_, isLevel := a.Value.Any().(slog.Level)
	if kind := a.Value.Kind(); kind == slog.KindString || kind == slog.KindAny && !isLevel {
		a.Value = slog.StringValue(unlikeTint.Replace(PrintableLines(a.Value.String())))
	}
	return a
}

// spelledOut writes durations as the text form has them, such as 1.5s: a bare
// number of nanoseconds does not say what it counts.
func spelledOut(_ []string, a slog.Attr) slog.Attr {
	if a.Value.Kind() == slog.KindDuration {
		a.Value = slog.StringValue(a.Value.Duration().String())
	}
	return a
}

// IsTerminal reports whether somebody sees what is written to w.
func IsTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
