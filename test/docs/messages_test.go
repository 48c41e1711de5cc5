package docs

import (
	"io/fs"
	"os"
	"path"
	"regexp"
	"strings"
	"testing"
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
	root := os.DirFS("../..")
	document, err := fs.ReadFile(root, "docs/troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	var code strings.Builder
	err = fs.WalkDir(root, ".", func(file string, _ fs.DirEntry, err error) error {
		if err != nil || path.Ext(file) != ".go" || strings.HasSuffix(file, "_test.go") {
			return err
		}
		text, err := fs.ReadFile(root, file)
		code.Write(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	// A literal may go on in the next line.
	all := regexp.MustCompile(`"\s*\+\s*"`).ReplaceAllString(code.String(), "")
	texts := quoted(string(document))
	for _, text := range texts {
		if elsewhere[text] == "" && !strings.Contains(all, text) {
			t.Errorf("%q is in docs/troubleshooting.md and not in the code", text)
		}
	}
	if len(texts) < 25 {
		t.Errorf("only %d texts were found", len(texts))
	}
}
