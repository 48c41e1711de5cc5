package main

import (
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/lmittmann/tint"
	"golang.org/x/term"
)

// newLog returns the daemon's log. Format auto means text on a terminal and
// JSON otherwise. Text is colored only on a terminal and not when NO_COLOR is
// set to anything (no-color.org).
func newLog(w io.Writer, level slog.Level, format string, getenv func(string) string) *slog.Logger {
	terminal := isTerminal(w)
	if format == "json" || (format == "auto" && !terminal) {
		return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level}))
	}
	return slog.New(tint.NewTextHandler(w, &tint.Options{
		Level:      level,
		TimeFormat: time.TimeOnly,
		NoColor:    !terminal || getenv("NO_COLOR") != "",
	}))
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
