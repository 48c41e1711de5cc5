package docs

import (
	"regexp"
	"strings"
	"testing"

	"github.com/renewd/renewd/test/tree"
)

// elsewhere are texts in docs/troubleshooting.md that other programs print.
var elsewhere = map[string]string{
	"certificate signed by unknown authority": "crypto/x509",
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

// TestMessages: the texts that docs/troubleshooting.md says operators see are in the
// code.
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
	texts := quoted(tree.Read(t, root, "docs/troubleshooting.md"))
	for _, text := range texts {
		if elsewhere[text] == "" && !strings.Contains(all, text) {
			t.Errorf("%q is in docs/troubleshooting.md and not in the code", text)
		}
	}
	if len(texts) < 25 {
		t.Errorf("only %d texts were found", len(texts))
	}
}
