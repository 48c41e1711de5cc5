package cli

import (
	"io"
	"log/slog"
	"os"
	"time"

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
	return tint.NewTextHandler(w, &tint.Options{
		Level:      level,
		TimeFormat: time.TimeOnly,
		NoColor:    !terminal || getenv("NO_COLOR") != "",
	})
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
