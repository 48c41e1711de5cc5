// Package cli has what the command lines of all programs share: usage errors, help,
// output and the log.
package cli

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/renewd/renewd/internal/config"
)

// The exit statuses of all programs.
const (
	ExitOK     = 0
	ExitFailed = 1
	// ExitPermanent is that of every error that no restart mends, so that a service manager
	// should not try: a wrong command line or configuration, a file with the wrong content,
	// owner or mode, a wrong store; see [config.IsPermanent].
	ExitPermanent = 2
)

// Env is the process environment of a command.
type Env struct {
	Getenv         func(string) string
	Stdin          io.Reader
	Stdout, Stderr io.Writer
}

// UsageError is the error of an invalid command line.
type UsageError struct{ text string }

func (e UsageError) Error() string { return e.text }

// Permanent is true; see [config.IsPermanent].
func (e UsageError) Permanent() bool { return true }

// Usagef returns a [UsageError].
func Usagef(format string, args ...any) error { return UsageError{fmt.Sprintf(format, args...)} }

// Report prints the error of a command, if any, and returns the exit status. It treats
// [flag.ErrHelp] as success.
func Report(program string, err error, e Env) int {
	var usage UsageError
	var wrong config.Error
	var text string
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return ExitOK
	case errors.As(err, &wrong):
		text = wrong.Error()
	case errors.As(err, &usage):
		text = fmt.Sprintf("%s: %s\nRun \"%s help\" for the usage.", program, usage, program)
	default:
		text = fmt.Sprintf("%s: %v", program, err)
	}
	text = PrintableLines(text)
	if toJournal(e.Stderr, e.Getenv) {
		text = journalError + strings.ReplaceAll(text, "\n", "\n"+journalError)
	}
	_, _ = fmt.Fprintln(e.Stderr, text)
	if config.IsPermanent(err) {
		return ExitPermanent
	}
	return ExitFailed
}

// When formats a time and its distance from now.
func When(t, now time.Time) string {
	d := t.Sub(now).Truncate(time.Second)
	text := t.UTC().Format("2006-01-02 15:04:05 UTC")
	switch {
	case d == 0:
		return text + " (now)"
	case d < 0:
		return text + " (" + span(-d) + " ago)"
	}
	return text + " (in " + span(d) + ")"
}

// span formats a duration, in days if it is long.
func span(d time.Duration) string {
	if days := int(d.Round(time.Hour) / (24 * time.Hour)); days >= 2 {
		return strconv.Itoa(days) + " days"
	}
	return config.Short(d)
}
