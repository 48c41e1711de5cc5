package docs

import (
	"path"
	"regexp"
	"strings"
	"testing"

	"github.com/renewd/renewd/test/tree"
)

// oneDash is a flag of one of our commands with one dash: Go's flag package takes it,
// and readers who know other tools take it for several short flags.
var oneDash = regexp.MustCompile("(?m)(?:^|[\\s`]|bin/|renewd-)(?:agent|server|keysetctl|demo) [^`\n|]*?[ \\[](-[a-z][a-z]+[a-z-]*)")

// listed is such a flag at the start of a line of a help text. Go code is indented with
// tabs.
var listed = regexp.MustCompile("(?m)^ +(-[a-z][a-z]+[a-z-]*)")

// TestFlags: documents and help texts write the flags of our commands with two dashes.
func TestFlags(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"run `agent run -config FILE`": "-config",
		"`keysetctl list -o json`":     "",
		"bin/server run --config x":    "",
		"`server evict ID [-gone]`":    "-gone",
		"go test ./cmd/agent -run X":   "",
	} {
		if got := oneDash.FindStringSubmatch(text); (got == nil) != (want == "") || got != nil && got[1] != want {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	}
	root := tree.FS("../..")
	for _, file := range tree.Files(t, root, ".md", ".go") {
		help := strings.HasPrefix(file, "cmd/") && !strings.HasSuffix(file, "_test.go")
		if path.Ext(file) == ".go" && !help {
			continue
		}
		text := tree.Read(t, root, file)
		found := oneDash.FindAllStringSubmatch(text, -1)
		if path.Ext(file) == ".go" {
			found = append(found, listed.FindAllStringSubmatch(text, -1)...)
		}
		for _, m := range found {
			t.Errorf("%s: %s: write --%s", file, m[0], m[1][1:])
		}
	}
}
