package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// Printf writes text to a command's output, through [PrintableLines]. A broken pipe is an
// error, because the output was not delivered.
func Printf(w io.Writer, format string, args ...any) error {
	if _, err := io.WriteString(w, PrintableLines(fmt.Sprintf(format, args...))); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// PrintJSON writes v as indented JSON. It escapes control characters (RFC 8259, section
// 7), so that a terminal does not interpret them. A decoder returns v unchanged.
func PrintJSON(w io.Writer, v any) error {
	out, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode output: %w", err)
	}
	var b strings.Builder
	for _, r := range string(out) {
		if isPrintableInLines(r) {
			b.WriteRune(r)
			continue
		}
		for _, unit := range utf16.AppendRune(nil, r) {
			fmt.Fprintf(&b, `\u%04x`, unit)
		}
	}
	return Printf(w, "%s\n", b.String())
}

// Printable replaces control characters in untrusted text for one line, so that a terminal
// does not interpret them.
func Printable(s string) string { return replaceUnless(unicode.IsPrint, s) }

// PrintableLines is [Printable] for text of several lines: it keeps line feeds and tabs.
func PrintableLines(s string) string { return replaceUnless(isPrintableInLines, s) }

func isPrintableInLines(r rune) bool { return unicode.IsPrint(r) || r == '\n' || r == '\t' }

func replaceUnless(keep func(rune) bool, s string) string {
	return strings.Map(func(r rune) rune {
		if keep(r) {
			return r
		}
		return utf8.RuneError
	}, s)
}
