package cli_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"testing"
	"unicode"

	"github.com/renewd/renewd/internal/cli"
)

// TestPrintable: control characters in untrusted text do not reach a terminal.
func TestPrintable(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]struct{ value, lines string }{
		"v1.2 größer":     {"v1.2 größer", "v1.2 größer"},
		"a\x1b[31mb":      {"a\uFFFD[31mb", "a\uFFFD[31mb"},
		"a\r\nb\tc":       {"a\uFFFD\uFFFDb\uFFFDc", "a\uFFFD\nb\tc"},
		"a\u202eb\xff":    {"a\uFFFDb\uFFFD", "a\uFFFDb\uFFFD"},
		"a\u009b2J\u007f": {"a\uFFFD2J\uFFFD", "a\uFFFD2J\uFFFD"},
	} {
		if got := cli.Printable(in); got != want.value {
			t.Errorf("%q becomes the value %q, want %q", in, got, want.value)
		}
		if got := cli.PrintableLines(in); got != want.lines {
			t.Errorf("%q becomes the lines %q, want %q", in, got, want.lines)
		}
	}
}

// command is text with each kind of control sequence.
const command = "a \\x1b[8m\x1b[2J\x1b]0;safe\a\u009b2J\r\u202e\U000E0001b"

// TestOutputHasNoControlSequences: no output function passes a control sequence.
func TestOutputHasNoControlSequences(t *testing.T) {
	t.Parallel()
	var decoded []string
	for name, write := range map[string]func(b *bytes.Buffer) error{
		"text": func(b *bytes.Buffer) error { return cli.Printf(b, "%s\n", command) },
		"table": func(b *bytes.Buffer) error {
			table := cli.NewTable(b)
			fmt.Fprintf(table, "ID\tNAME\n%s\t%s\n", command, command)
			return table.Flush()
		},
		"JSON": func(b *bytes.Buffer) error {
			if err := cli.PrintJSON(b, []string{command}); err != nil {
				return err
			}
			return json.Unmarshal(b.Bytes(), &decoded)
		},
		"error": func(b *bytes.Buffer) error {
			cli.Report("prog", errors.New(command), cli.Env{Stderr: b})
			return nil
		},
	} {
		var b bytes.Buffer
		if err := write(&b); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		checkPrintable(t, name, b.String())
	}
	if len(decoded) != 1 || decoded[0] != command {
		t.Errorf("JSON is decoded to %q, want %q", decoded, command)
	}
}

// checkPrintable fails the test for each character that is not printable.
func checkPrintable(t *testing.T, name, out string) {
	t.Helper()
	for _, r := range out {
		if !unicode.IsPrint(r) && r != '\n' {
			t.Errorf("%s: %q has %U", name, out, r)
		}
	}
}

// TestLogHasNoControlSequences: on a terminal a log has color sequences and no others.
func TestLogHasNoControlSequences(t *testing.T) {
	t.Parallel()
	colors := regexp.MustCompile("\x1b\\[[0-9;]*m")
	for _, noColor := range []string{"", "1"} {
		master, slave := openTerminal(t)
		log := cli.NewLog(slave, slog.LevelDebug, "text", func(string) string { return noColor }).With("with", command)
		log.Error(command, "text", command, "error", errors.New(command), "list", []string{command}, slog.Group("g", "text", command))
		line, err := bufio.NewReader(master).ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if strings.Count(line, "]0;safe") != 6 || strings.Count(line, "[8m") != 6 || strings.Contains(line, "\x1b[8m") || colors.MatchString(line) != (noColor == "") {
			t.Errorf("NO_COLOR=%q: %q", noColor, line)
		}
		// The terminal itself ends lines with CR LF.
		checkPrintable(t, "log, NO_COLOR="+noColor, colors.ReplaceAllString(strings.TrimSuffix(line, "\r\n"), ""))
	}
}
