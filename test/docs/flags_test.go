package docs

import (
	"regexp"
	"testing"

	"github.com/renewd/renewd/test/tree"
)

// oneDash is a flag of one of our commands with one dash: Go's flag package takes it,
// and readers who know other tools take it for several short flags.
var oneDash = regexp.MustCompile("(?m)(?:^|[\\s`]|bin/|renewd-)(?:agent|server|keysetctl|demo) [^`\n|]*?[ \\[](-[a-z][a-z]+[a-z-]*)")

// TestFlags: documents write the flags of our commands with two dashes.
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
	for _, file := range tree.Files(t, root, ".md") {
		for _, m := range oneDash.FindAllStringSubmatch(tree.Read(t, root, file), -1) {
			t.Errorf("%s: %s: write --%s", file, m[0], m[1][1:])
		}
	}
}
