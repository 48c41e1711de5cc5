// Package cli has what the command lines of all programs share: usage errors, help,
// output and the log.
package cli

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/renewd/renewd/internal/config"
)

// The exit statuses of all programs. A service manager should not restart a program after
// ExitUsage, because it would fail again.
const (
	ExitOK     = 0
	ExitFailed = 1
	ExitUsage  = 2 // wrong command line or configuration
)

// Env is the process environment of a command.
type Env struct {
	Getenv         func(string) string
	Stdout, Stderr io.Writer
}

// UsageError is the error of an invalid command line.
type UsageError struct{ text string }

func (e UsageError) Error() string { return e.text }

// Usagef returns a [UsageError].
func Usagef(format string, args ...any) error { return UsageError{fmt.Sprintf(format, args...)} }

// Report prints the error of a command, if any, and returns the exit status. It treats
// [flag.ErrHelp] as success.
func Report(program string, err error, e Env) int {
	var usage UsageError
	var wrong config.Error
	var text string
	status := ExitFailed
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return ExitOK
	case errors.As(err, &wrong):
		text, status = wrong.Error(), ExitUsage
	case errors.As(err, &usage):
		text, status = fmt.Sprintf("%s: %s\nRun \"%s help\" for the usage.", program, usage, program), ExitUsage
	default:
		text = fmt.Sprintf("%s: %v", program, err)
	}
	text = PrintableLines(text)
	if toJournal(e.Stderr, e.Getenv) {
		text = journalError + strings.ReplaceAll(text, "\n", "\n"+journalError)
	}
	_, _ = fmt.Fprintln(e.Stderr, text)
	return status
}

// ParseFlags parses args into fset and returns the remaining arguments. If args ask for
// help, it prints the help text and returns [flag.ErrHelp].
func ParseFlags(fset *flag.FlagSet, args []string, help string, e Env) ([]string, error) {
	fset.SetOutput(io.Discard)
	fset.Usage = func() {}
	if err := fset.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			if err := Printf(e.Stdout, "%s", help); err != nil {
				return nil, err
			}
			return nil, flag.ErrHelp
		}
		return nil, Usagef("%s: %v", fset.Name(), err)
	}
	return fset.Args(), nil
}

// ParseOnlyFlags is [ParseFlags] without remaining arguments.
func ParseOnlyFlags(fset *flag.FlagSet, args []string, help string, e Env) error {
	rest, err := ParseFlags(fset, args, help, e)
	if err == nil && len(rest) > 0 {
		return Usagef("%s: unexpected argument %q", fset.Name(), rest[0])
	}
	return err
}

// ConfigCheck runs a program's config command. Its one subcommand, check, loads the
// configuration and reports whether it is valid.
func ConfigCheck[C any](s *config.Schema[C], args []string, help string, e Env) error {
	if len(args) > 0 && IsHelp(args[0]) {
		return Printf(e.Stdout, "%s", help)
	}
	if len(args) == 0 || args[0] != "check" {
		return Usagef("config: the one subcommand is check")
	}
	fset := flag.NewFlagSet("config check", flag.ContinueOnError)
	load := s.Flags(fset, e.Getenv)
	if err := ParseOnlyFlags(fset, args[1:], help, e); err != nil {
		return err
	}
	file := fset.Lookup("config").Value.String()
	if file == "" {
		return Usagef("config check: give the file with -config")
	}
	if _, err := load(); err != nil {
		return err
	}
	return Printf(e.Stdout, "%s: ok\n", file)
}

// IsHelp reports whether an argument asks for help.
func IsHelp(arg string) bool { return arg == "-h" || arg == "-help" || arg == "--help" }

// PrintVersion runs a program's version command.
func PrintVersion(program, linked string, args []string, e Env) error {
	fset := flag.NewFlagSet("version", flag.ContinueOnError)
	if err := ParseOnlyFlags(fset, args, "Usage: "+program+" version\n", e); err != nil {
		return err
	}
	return Printf(e.Stdout, "renewd %s %s\n", program, Version(linked))
}

// CheckOutput checks the value of a command's -o flag.
func CheckOutput(command, output string) error {
	if output != "text" && output != "json" {
		return Usagef("%s: -o takes text or json, not %q", command, output)
	}
	return nil
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

// Version returns the linker's version, otherwise the one that the Go tool recorded.
func Version(linked string) string {
	if linked != "" {
		return linked
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(unknown)"
}
