package cli_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"regexp"
	"strings"
	"testing"
	"unicode"

	"golang.org/x/sys/unix"

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

// Tables fit a terminal, and are complete elsewhere.
func TestTableFits(t *testing.T) {
	t.Parallel()
	const long = "spiffe://example.org/spire/agent/join_token/4a6f4c1e-9f0b-4d2c-8a9e-0123456789ab"
	rows := "ID\tSTATE\tREASON\n" + long + "\tactive\tno report for 3h\n" + "短い\t☂️\té\n\nNAME\tVALUE\tMORE\na\tb\tc\n"
	for width, want := range map[int]string{
		0: "ID" + strings.Repeat(" ", 80) + "STATE   REASON\n" + long + "  active  no report for 3h\n" + "短い" + strings.Repeat(" ", 78) + "☂️      é\n\nNAME  VALUE  MORE\na     b      c\n",
		60: `ID                                  STATE   REASON
spiffe://example…9e-0123456789ab    active  no report for 3h
`,
		40: `ID      spiffe://example.org/spire/agent
        /join_token/4a6f4c1e-9f0b-4d2c-8
        a9e-0123456789ab
STATE   active
REASON  no report for 3h

ID      短い
STATE   ☂️
REASON  é

NAME  VALUE  MORE
a     b      c
`,
		8: `ID    sp
      if
`,
	} {
		got := tableOnTerminal(t, width, rows)
		for line := range strings.Lines(got) {
			if w := cli.Width(strings.TrimSuffix(line, "\n")); width > 0 && w > width {
				t.Errorf("%d columns: %q has %d", width, line, w)
			}
		}
		if width == 60 {
			want = ""
			for _, part := range []string{"STATE   REASON\n", "…", "active  no report for 3h\n", "0123456789ab"} {
				if !strings.Contains(got, part) {
					t.Errorf("%d columns: no %q in\n%s", width, part, got)
				}
			}
		}
		if !strings.HasPrefix(got, want) {
			t.Errorf("%d columns:\n%s\nwant\n%s", width, got, want)
		}
	}
	// Names and values wrap, so that nothing is lost.
	if got, want := tableOnTerminal(t, 30, "Ready:\tyes\nAgent:\t"+long[:40]+"\n"), "Ready:  yes\nAgent:  spiffe://example.org/s\n        pire/agent/join_to\n"; got != want {
		t.Errorf("names and values:\n%s\nwant\n%s", got, want)
	}
}

// tableOnTerminal writes a table on a terminal of that width; 0 is no terminal.
func tableOnTerminal(t *testing.T, width int, rows string) string {
	t.Helper()
	var b bytes.Buffer
	if width == 0 {
		writeTable(t, &b, rows)
		return b.String()
	}
	master, slave := openTerminal(t)
	if err := unix.IoctlSetWinsize(int(slave.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: uint16(width), Row: 24}); err != nil {
		t.Fatal(err)
	}
	writeTable(t, slave, rows+"\n\x04")
	out := make([]byte, 1<<16)
	n := 0
	for !strings.Contains(string(out[:n]), "\uFFFD") {
		m, err := master.Read(out[n:])
		if err != nil {
			t.Fatal(err)
		}
		n += m
	}
	text, _, _ := strings.Cut(strings.ReplaceAll(string(out[:n]), "\r\n", "\n"), "\uFFFD")
	return strings.TrimSuffix(text, "\n")
}

func writeTable(t *testing.T, w io.Writer, rows string) {
	t.Helper()
	table := cli.NewTable(w)
	_, _ = io.WriteString(table, rows)
	if err := cli.Flush(table); err != nil {
		t.Fatal(err)
	}
}

func TestShorten(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		in          string
		width       int
		end, middle string
	}{
		{"abcdef", 6, "abcdef", "abcdef"},
		{"abcdef", 5, "abcd…", "ab…ef"},
		{"日本語テスト", 7, "日本語…", "日…スト"},
		{"e\u0301e\u0301e\u0301e\u0301", 3, "e\u0301e\u0301…", "e\u0301…e\u0301"},
		{"👩‍👩‍👧‍👦👩‍👩‍👧‍👦x", 3, "👩‍👩‍👧‍👦…", "…x"},
		{"abc", 1, "…", "…"},
		{"abc", 0, "", ""},
	} {
		if got := cli.Shorten(tt.in, tt.width, cli.Ellipsis); got != tt.end || cli.Width(got) > tt.width {
			t.Errorf("%q in %d columns: %q, want %q", tt.in, tt.width, got, tt.end)
		}
		if got := cli.ShortenMiddle(tt.in, tt.width, cli.Ellipsis); got != tt.middle || cli.Width(got) > tt.width {
			t.Errorf("%q in %d columns: %q in the middle, want %q", tt.in, tt.width, got, tt.middle)
		}
	}
}

func TestUTF8(t *testing.T) {
	t.Parallel()
	for env, want := range map[string]bool{"": false, "LANG=de_DE.UTF-8": true, "LANG=C.utf8": true, "LANG=C": false, "LANG=de_DE.UTF-8 LC_ALL=C": false, "LC_CTYPE=en_US.UTF-8 LANG=C": true} {
		values := map[string]string{}
		for _, pair := range strings.Fields(env) {
			name, value, _ := strings.Cut(pair, "=")
			values[name] = value
		}
		if got := cli.UTF8(func(name string) string { return values[name] }); got != want {
			t.Errorf("%q: %v", env, got)
		}
	}
}
