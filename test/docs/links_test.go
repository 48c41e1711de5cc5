package docs

import (
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"unicode"

	"github.com/renewd/renewd/test/tree"
)

var (
	codeBlock = regexp.MustCompile("(?ms)^ *```.*?^ *```$")
	codeSpan  = regexp.MustCompile("`[^`\n]*`")
	link      = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading   = regexp.MustCompile(`(?m)^#{1,6} +(.*?) *$`)
	scheme    = regexp.MustCompile(`^[a-z]+:`)
)

// anchors are the names by which a code host links to the headings of a document.
func anchors(text string) (names []string) {
	seen := make(map[string]int)
	for _, h := range heading.FindAllStringSubmatch(codeBlock.ReplaceAllString(text, ""), -1) {
		name := strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-', r == '_', unicode.IsLetter(r), unicode.IsDigit(r):
				return unicode.ToLower(r)
			}
			return -1
		}, h[1])
		if n := seen[name]; n > 0 {
			names = append(names, fmt.Sprintf("%s-%d", name, n))
		} else {
			names = append(names, name)
		}
		seen[name]++
	}
	return names
}

// check returns the relative links of all documents that lead to no file or to no
// heading, and how many relative links there are.
func check(t *testing.T, root fs.FS) (broken []string, links int) {
	t.Helper()
	for _, file := range tree.Files(t, root, ".md") {
		prose := codeSpan.ReplaceAllString(codeBlock.ReplaceAllString(tree.Read(t, root, file), ""), "")
		for _, m := range link.FindAllStringSubmatch(prose, -1) {
			if scheme.MatchString(m[1]) {
				continue
			}
			links++
			target, anchor, hasAnchor := strings.Cut(m[1], "#")
			to := file
			if target != "" {
				to = path.Join(path.Dir(file), target)
			}
			if _, err := fs.Stat(root, to); err != nil {
				broken = append(broken, fmt.Sprintf("%s: %s: no such file", file, m[1]))
				continue
			}
			if hasAnchor && !slices.Contains(anchors(tree.Read(t, root, to)), anchor) {
				broken = append(broken, fmt.Sprintf("%s: %s: no such heading", file, m[1]))
			}
		}
	}
	return broken, links
}

// TestLinks: every relative link in a document leads to a file, and to a heading if
// it names one.
func TestLinks(t *testing.T) {
	t.Parallel()
	broken, links := check(t, tree.FS("../.."))
	for _, b := range broken {
		t.Error(b)
	}
	if links < 50 {
		t.Errorf("only %d links were found", links)
	}
}

// TestBrokenLinks: links without a target are found, and no others.
func TestBrokenLinks(t *testing.T) {
	t.Parallel()
	broken, links := check(t, fstest.MapFS{
		"a.md": {Data: []byte("# The server's clock\n## Twice\n## Twice\n" +
			"[1](b/c.md) [2](#the-servers-clock) [3](#twice-1) [4](b/c.md#d-e) ![5](b/p.svg) [6](https://example.org/x)\n" +
			"[7](c.md) [8](#twice-2) [9](b/c.md#f) [10](../a.md)\n`[11](x.md)`\n```\n# Not a heading\n[12](y.md)\n```\n[13](#not-a-heading)\n")},
		"b/c.md":  {Data: []byte("### D `e`\n[1](../a.md#twice)\n")},
		"b/p.svg": {},
	})
	want := []string{"a.md: c.md: no such file", "a.md: #twice-2: no such heading", "a.md: b/c.md#f: no such heading",
		"a.md: ../a.md: no such file", "a.md: #not-a-heading: no such heading"}
	if !slices.Equal(broken, want) {
		t.Errorf("broken: %q, want %q", broken, want)
	}
	if links != 11 {
		t.Errorf("%d links, want 11", links)
	}
}
