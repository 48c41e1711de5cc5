package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// Printf writes text to a command's output, as [PrintableLines] leaves it. A
// broken pipe is an error like any other: what was asked for was not delivered.
func Printf(w io.Writer, format string, args ...any) error {
	if _, err := io.WriteString(w, PrintableLines(fmt.Sprintf(format, args...))); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// PrintJSON writes v as indented JSON. What a terminal would take for a command
// is escaped (RFC 8259, section 7): a decoder returns v unchanged.
func PrintJSON(w io.Writer, v any) error {
	out, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode output: %w", err)
	}
	var b strings.Builder
	for _, r := range string(out) {
		if onLines(r) {
			b.WriteRune(r)
			continue
		}
		for _, unit := range utf16.AppendRune(nil, r) {
			fmt.Fprintf(&b, `\u%04x`, unit)
		}
	}
	return Printf(w, "%s\n", b.String())
}

// NewTable starts an aligned table; Flush it. Cells reach w as [PrintableLines]
// leaves them.
func NewTable(w io.Writer) *tabwriter.Writer {
	return tabwriter.NewWriter(printableWriter{w}, 0, 0, 2, ' ', 0)
}

// printableWriter is for writers that split no character.
type printableWriter struct{ w io.Writer }

func (p printableWriter) Write(b []byte) (int, error) {
	if _, err := io.WriteString(p.w, PrintableLines(string(b))); err != nil {
		return 0, err
	}
	return len(b), nil
}

// Printable replaces what a terminal would take for a command in text that came
// from elsewhere and belongs on one line.
func Printable(s string) string { return replaceUnless(unicode.IsPrint, s) }

// PrintableLines is [Printable] for text of several lines: line feeds and tabs
// stay.
func PrintableLines(s string) string { return replaceUnless(onLines, s) }

func onLines(r rune) bool { return unicode.IsPrint(r) || r == '\n' || r == '\t' }

func replaceUnless(fits func(rune) bool, s string) string {
	return strings.Map(func(r rune) rune {
		if fits(r) {
			return r
		}
		return utf8.RuneError
	}, s)
}
