package deploy

import (
	"go/ast"
	"go/parser"
	"go/token"
	"regexp"
	"strings"
	"testing"

	"github.com/renewd/renewd/test/tree"
)

// TestThreats: in docs/security.md each row of the tables that begin with "who" names tests,
// and there are tests of these names.
func TestThreats(t *testing.T) {
	t.Parallel()
	known := tests(t)
	named := regexp.MustCompile("`([a-z0-9]+\\.Test[A-Za-z0-9_]+)`")
	rows, inTable := 0, false
	for line := range strings.Lines(string(read(t, "../docs/security.md"))) {
		if strings.HasPrefix(line, "| who ") || !strings.HasPrefix(line, "|") {
			inTable = strings.HasPrefix(line, "| who ")
			continue
		}
		if !inTable || strings.HasPrefix(line, "|--") {
			continue
		}
		rows++
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		if len(cells) != 4 {
			t.Errorf("%d cells, want 4: %s", len(cells), line)
			continue
		}
		found := named.FindAllStringSubmatch(cells[3], -1)
		if len(found) == 0 {
			t.Errorf("no test shows:%s", strings.Join(cells[:3], ":"))
		}
		for _, name := range found {
			if !known[name[1]] {
				t.Errorf("no test %s, for:%s", name[1], cells[0])
			}
		}
	}
	if rows < 20 {
		t.Errorf("only %d rows were found", rows)
	}
}

// tests returns the names of all tests of this module, as package.TestName.
func tests(t *testing.T) map[string]bool {
	t.Helper()
	known := make(map[string]bool)
	root := tree.FS("..")
	for _, name := range tree.Files(t, root, ".go") {
		if !strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, tree.Read(t, root, name), parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range file.Decls {
			if f, ok := decl.(*ast.FuncDecl); ok && f.Recv == nil {
				known[strings.TrimSuffix(file.Name.Name, "_test")+"."+f.Name.Name] = true
			}
		}
	}
	return known
}
