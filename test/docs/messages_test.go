package docs

import (
	"regexp"
	"strings"
	"testing"

	"github.com/renewd/renewd/test/tree"
)

// elsewhere are quoted texts that other programs print.
var elsewhere = map[string]string{
	"certificate signed by unknown authority": "crypto/x509",
	"connection refused":                      "the kernel",
	"401 Unauthorized":                        "net/http",
	"403 Forbidden":                           "net/http",
	"243/CREDENTIALS":                         "systemd",
}

// quoted returns the code in the first column of a document's tables, without labels
// of metrics.
func quoted(document string) (texts []string) {
	for line := range strings.Lines(document) {
		cells, ok := strings.CutPrefix(line, "| ")
		if !ok {
			continue
		}
		first, _, _ := strings.Cut(cells, " | ")
		for _, span := range codeSpan.FindAllString(first, -1) {
			text, _, _ := strings.Cut(strings.Trim(span, "`"), "{")
			texts = append(texts, text)
		}
	}
	return texts
}

// TestMessages: the texts that docs/troubleshooting.md and "Messages" of docs/kubernetes.md
// say operators see are in the code.
func TestMessages(t *testing.T) {
	t.Parallel()
	root := tree.FS("../..")
	var code strings.Builder
	for _, file := range tree.Files(t, root, ".go") {
		if !strings.HasSuffix(file, "_test.go") {
			code.WriteString(tree.Read(t, root, file))
		}
	}
	// A literal may go on in the next line.
	all := regexp.MustCompile(`"\s*\+\s*"`).ReplaceAllString(code.String(), "")
	_, kubernetes, _ := strings.Cut(tree.Read(t, root, "docs/kubernetes.md"), "\n## Messages\n")
	kubernetes, _, _ = strings.Cut(kubernetes, "\n## ")
	for document, want := range map[string]struct {
		text  string
		texts int
	}{"docs/troubleshooting.md": {tree.Read(t, root, "docs/troubleshooting.md"), 25}, "docs/kubernetes.md": {kubernetes, 6}} {
		texts := quoted(want.text)
		for _, text := range texts {
			if elsewhere[text] == "" && !strings.Contains(all, text) {
				t.Errorf("%q is in %s and not in the code", text, document)
			}
		}
		if len(texts) < want.texts {
			t.Errorf("only %d texts were found in %s", len(texts), document)
		}
	}
}
