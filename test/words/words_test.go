// Package words checks the words that code and documents are written in.
package words

import (
	"go/scanner"
	"go/token"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/renewd/renewd/test/tree"
)

// retired are words that readers have to stop at, and what is written instead.
var retired = []struct {
	pattern string
	instead string
}{
	{`any ?more`, "no longer, or nothing"},
	{`(hang|hangs|hanging|hung) (on|from)`, "depends on, still uses"},
	{`anew`, "again"},
	{`again and again`, "repeatedly, or how often"},
	{`(is|are|was|were|be|been|being) told`, "who tells whom, or: receives, learns, is notified"},
	{`prov(e|es|ed|en|ing)|proofs?`, "attest, attestation; shows; checks"},
	{`own SVIDs?`, "agent SVID"},
	{`(for|to|of|by|with|from|than) who`, "a subject: those who, an operator who, if you"},
	{`strangers?`, "unknown, anonymous, overflow ID"},
	{`works again`, "recovered"},
	{`(is|are|be|was|were) read again`, "reloaded"},
	{`does more than it may`, "rate limited, delayed, rejected"},
	{`listens for`, "listening"},
	{`clock was stepped`, "clock step detected"},
	{`set aside`, "moved"},
	{`whole numbers?`, "integer"},
	{`true or false`, "boolean"},
	{`born`, "createdAt, begins"},
	{`flying|flights?`, "in flight"},
	{`nowhere|quiet|nobody's`, "noop, or the name of what it is"},
	{`max ?patience`, "maxWait"},
	{`say ?again`, "logInterval"},
	{`of ?strangers`, "isOverflowID"},
	{`reunion`, "reconnectGrace"},
	{`unready`, "dequeue"},
}

// exceptions are texts that hold a retired word for a reason. Each is in the file named.
var exceptions = []struct {
	file   string
	text   string
	reason string
}{
	{"deploy/boot_test.go", "--quiet", "a flag of systemd-nspawn"},
	{"findings/lib.sh", "--quiet", "a flag of systemd-nspawn"},
}

// A text is a retired word's only if the word is one of its words: camel case counts as
// words, too.
func TestRetiredWords(t *testing.T) {
	t.Parallel()
	patterns := make([]*regexp.Regexp, len(retired))
	all := make([]string, len(retired))
	for i, r := range retired {
		all[i] = strings.ReplaceAll(r.pattern, " ", `\s+`)
		patterns[i] = words(all[i])
	}
	some := words(strings.Join(all, "|")) // few texts have one
	used := make([]bool, len(exceptions))
	found := 0
	for _, file := range texts(t) {
		for _, p := range passages(t, file) {
			if !some.MatchString(p.text) {
				continue
			}
			for i, pattern := range patterns {
				m := pattern.FindString(inFlight.ReplaceAllString(p.text, ""))
				if m == "" {
					continue
				}
				allowed := slices.IndexFunc(exceptions, func(e struct{ file, text, reason string }) bool {
					return e.file == file && strings.Contains(p.text, e.text)
				})
				if allowed >= 0 {
					used[allowed] = true
					continue
				}
				found++
				t.Errorf("%s:%d: %q: write %s", file, p.line, m, retired[i].instead)
			}
		}
	}
	for i, e := range exceptions {
		if !used[i] {
			t.Errorf("the exception for %q in %s is not needed", e.text, e.file)
		}
	}
	t.Logf("%d retired words, %d exceptions", found, len(exceptions))
}

// words matches the pattern as whole words.
func words(pattern string) *regexp.Regexp { return regexp.MustCompile(`(?i)\b(` + pattern + `)\b`) }

// passage is a text with the line that it begins at.
type passage struct {
	line int
	text string
}

// inFlight is the field's word for what was asked for and has not come.
var inFlight = regexp.MustCompile(`(?i)\bin[ -]flight\b`)

var camel = regexp.MustCompile(`([a-z0-9])([A-Z])`)

// passages returns the comments, strings and names of a Go file, and the lines of others.
func passages(t *testing.T, file string) []passage {
	t.Helper()
	content := tree.Read(t, root, file)
	var out []passage
	if path.Ext(file) != ".go" {
		for i, line := range strings.Split(content, "\n") {
			out = append(out, passage{i + 1, line})
		}
		return out
	}
	set := token.NewFileSet()
	f := set.AddFile(file, -1, len(content))
	var s scanner.Scanner
	s.Init(f, []byte(content), nil, scanner.ScanComments)
	for {
		pos, tok, lit := s.Scan()
		switch tok {
		case token.EOF:
			return out
		case token.IDENT:
			lit = camel.ReplaceAllString(lit, "$1 $2")
		case token.COMMENT, token.STRING:
		default:
			continue
		}
		line := f.Line(pos)
		for i, text := range strings.Split(lit, "\n") {
			out = append(out, passage{line + i, text})
		}
	}
}

// root is the project's folder.
var root = tree.FS("../..")

// texts returns the files that people read, but for what is generated.
func texts(t *testing.T) []string {
	t.Helper()
	files := tree.Files(t, root, ".go", ".md", ".yaml", ".yml", ".txt", ".txtar", ".sh", ".proto", ".service", ".socket", ".conf", ".mod", "")
	return slices.DeleteFunc(files, func(file string) bool {
		return strings.HasSuffix(file, ".pb.go") || file == "LICENSE" || strings.Contains(file, "/fuzz/") || strings.HasPrefix(file, "test/words/")
	})
}
