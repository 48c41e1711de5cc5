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

// LogFormats are the formats of NewLog.
var LogFormats = []string{"auto", "text", "json"}

// NewLog returns a daemon's log; a level that is a *[slog.LevelVar] can change. Format auto means text on a terminal and JSON
// otherwise. Text has colors only on a terminal, and not if NO_COLOR is set to any value
// (no-color.org). Lines to systemd's journal start with the journal's priority.
func NewLog(w io.Writer, level slog.Leveler, format string, getenv func(string) string) *slog.Logger {
	if toJournal(w, getenv) {
		l := &line{w: w}
		return slog.New(journal{newHandler(l, level, format, getenv), l})
	}
	return slog.New(newHandler(w, level, format, getenv))
}

func newHandler(w io.Writer, level slog.Leveler, format string, getenv func(string) string) slog.Handler {
	terminal := IsTerminal(w)
	if format == "json" || (format == "auto" && !terminal) {
		return slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level, ReplaceAttr: durationText})
	}
	return NewTextHandler(w, level, time.TimeOnly, terminal && getenv("NO_COLOR") == "")
}

// NewTextHandler returns a handler that writes readable text. It passes values through
// [PrintableLines].
func NewTextHandler(w io.Writer, level slog.Leveler, timeFormat string, color bool) slog.Handler {
	return tint.NewTextHandler(w, &tint.Options{
		Level: level, TimeFormat: timeFormat, NoColor: !color, ReplaceAttr: printable,
	})
}

// tintWorkaround replaces what tint 1.2.1 does not write correctly: with colors, a literal
// \x1b in a quoted value becomes an escape character; without colors, a value ends before
// the first U+FFFD.
var tintWorkaround = strings.NewReplacer(`\x1b`, `\x1B`, string(utf8.RuneError), "?")

// printable makes text values printable. It does not change other values and the record's
// level.
func printable(_ []string, a slog.Attr) slog.Attr {
	_, isLevel := a.Value.Any().(slog.Level)
	if kind := a.Value.Kind(); kind == slog.KindString || kind == slog.KindAny && !isLevel {
		a.Value = slog.StringValue(tintWorkaround.Replace(PrintableLines(a.Value.String())))
	}
	return a
}

// durationText formats durations with a unit, such as 1.5s. JSON would have a number of
// nanoseconds.
func durationText(_ []string, a slog.Attr) slog.Attr {
	if a.Value.Kind() == slog.KindDuration {
		a.Value = slog.StringValue(a.Value.Duration().String())
	}
	return a
}

// IsTerminal reports whether a stream is a terminal.
func IsTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// HasControl reports whether a stream is a terminal with control sequences.
func HasControl(stream any, getenv func(string) string) bool {
	return IsTerminal(stream) && getenv("TERM") != "dumb"
}

// Colored reports whether to use color: on a terminal, unless NO_COLOR is set to any value
// (no-color.org).
func Colored(stream any, getenv func(string) string) bool {
	return HasControl(stream, getenv) && getenv("NO_COLOR") == ""
}
