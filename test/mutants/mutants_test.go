package mutants

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/printer"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	root = "../.."
	list = "survivors.txt"
	// least is the part of the mutants in code that the tests run that has to die.
	least = 0.95
)

var reports = flag.String("reports", "", "folder with the reports of gremlins: FOLDER.json for each folder of the module")

// A mutant is named by what it changes and not by its line, so that other edits do not
// concern the list.
type mutant struct {
	folder   string // of its package
	function string
	operator string // as gremlins calls it
	code     string // the statement or expression whose operator is changed
}

func (m mutant) String() string {
	return strings.Join([]string{m.folder, m.function, m.operator, m.code}, " ")
}

// Each mutant of the list is one of the code, and has a reason.
func TestListMatchesTheCode(t *testing.T) {
	t.Parallel()
	known := make(map[string]map[string]bool) // operands of each function, by folder
	for m := range survivors(t) {
		if known[m.folder] == nil {
			known[m.folder] = make(map[string]bool)
			for _, file := range sources(t, m.folder) {
				for _, o := range operands(t, file) {
					known[m.folder][o.function+" "+o.code] = true
				}
			}
		}
		if !known[m.folder][m.function+" "+m.code] {
			t.Errorf("%s: %v: the code has no such expression", list, m)
		}
	}
}

// The mutants that survive are those of the list, and few. It judges the packages that
// have a report of "make mutate".
func TestSurvivors(t *testing.T) {
	t.Parallel()
	if *reports == "" {
		t.Skip("no reports: make mutate")
	}
	all := results(t)
	listed := survivors(t)
	for _, folder := range slices.Sorted(maps.Keys(all)) {
		r := all[folder]
		share := float64(r.killed) / float64(r.killed+r.lived)
		t.Logf("%-24s %4d mutants: %d killed, %d survived, %d in code that no test of the package runs; %.1f %% of those run died",
			folder, r.killed+r.lived+r.notRun, r.killed, r.lived, r.notRun, 100*share)
		if share < least {
			t.Errorf("%s: fewer than %.0f %% died", folder, 100*least)
		}
		for m, at := range r.survivors {
			if listed[m] == "" {
				t.Errorf("%s: a mutant survives: add a test that kills it, or list it with the reason why it does not matter:\n%v", at, m)
			}
		}
		for m := range listed {
			if _, survived := r.survivors[m]; m.folder == folder && !survived {
				t.Errorf("%s: this mutant does not survive:\n%v", list, m)
			}
		}
	}
}

// survivors reads the list: each line that begins at the margin is a mutant, and the
// indented lines below are the reason.
func survivors(t *testing.T) map[mutant]string {
	t.Helper()
	text, err := os.ReadFile(list)
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[mutant]string)
	var open []mutant // without a reason so far
	var last []mutant
	for line := range strings.Lines(string(text)) {
		line = strings.TrimRight(line, "\n")
		switch {
		case line == "" || strings.HasPrefix(line, "#"):
		case strings.HasPrefix(line, "\t"):
			if len(open) > 0 {
				last, open = open, nil
			}
			for _, m := range last {
				out[m] += strings.TrimSpace(line) + " "
			}
		default:
			part := strings.SplitN(line, " ", 4)
			if len(part) != 4 {
				t.Fatalf("%s: %q is not: folder function operator code", list, line)
			}
			open = append(open, mutant{part[0], part[1], part[2], part[3]})
		}
	}
	if len(open) > 0 {
		t.Errorf("%s: %v has no reason", list, open[0])
	}
	return out
}

// result is what became of the mutants of one folder.
type result struct {
	killed, lived, notRun int
	survivors             map[mutant]string // where each of them is
}

// results reads the reports. That of a folder is FOLDER.json and covers the folders in it.
func results(t *testing.T) map[string]*result {
	t.Helper()
	out := make(map[string]*result)
	err := filepath.WalkDir(*reports, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		var report struct {
			Files []struct {
				Name    string `json:"file_name"`
				Mutants []struct {
					Type, Status string
					Line, Column int
				} `json:"mutations"`
			}
		}
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(text, &report); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		folder, err := filepath.Rel(*reports, strings.TrimSuffix(name, ".json"))
		if err != nil {
			return err
		}
		for _, f := range report.Files {
			file := path.Join(filepath.ToSlash(folder), f.Name)
			at := operands(t, file)
			r := out[path.Dir(file)]
			if r == nil {
				r = &result{survivors: make(map[mutant]string)}
				out[path.Dir(file)] = r
			}
			for _, m := range f.Mutants {
				switch m.Status {
				case "KILLED", "TIMED OUT":
					r.killed++
				case "NOT COVERED":
					r.notRun++
				case "LIVED":
					r.lived++
					o, ok := at[place{m.Line, m.Column}]
					if !ok {
						return fmt.Errorf("%s: %s:%d:%d has no operator: the report is older than the code", name, file, m.Line, m.Column)
					}
					r.survivors[mutant{path.Dir(file), o.function, m.Type, o.code}] = fmt.Sprintf("%s:%d", file, m.Line)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func sources(t *testing.T, folder string) (out []string) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(root, folder, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if !strings.HasSuffix(name, "_test.go") {
			out = append(out, path.Join(folder, filepath.Base(name)))
		}
	}
	return out
}

type (
	place   struct{ line, column int } // of an operator
	operand struct{ function, code string }
)

// operands returns what each operator of a file is applied to, by the operator's place.
func operands(t *testing.T, file string) map[place]operand {
	t.Helper()
	set := token.NewFileSet()
	parsed, err := parser.ParseFile(set, filepath.Join(root, file), nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[place]operand)
	for _, d := range parsed.Decls {
		function := "-" // a declaration outside of all functions
		if f, ok := d.(*ast.FuncDecl); ok {
			function = f.Name.Name
			if f.Recv != nil {
				function = strings.TrimPrefix(code(t, set, f.Recv.List[0].Type), "*") + "." + function
			}
		}
		ast.Inspect(d, func(n ast.Node) bool {
			var operator token.Pos
			switch n := n.(type) {
			case *ast.BinaryExpr:
				operator = n.OpPos
			case *ast.UnaryExpr:
				operator = n.OpPos
			case *ast.AssignStmt:
				operator = n.TokPos
			case *ast.IncDecStmt:
				operator = n.TokPos
			case *ast.BranchStmt:
				operator = n.TokPos
			default:
				return true
			}
			p := set.Position(operator)
			out[place{p.Line, p.Column}] = operand{function, code(t, set, n)}
			return true
		})
	}
	return out
}

// code returns the text of a node in one line.
func code(t *testing.T, set *token.FileSet, n ast.Node) string {
	t.Helper()
	var b bytes.Buffer
	if err := printer.Fprint(&b, set, n); err != nil {
		t.Fatal(err)
	}
	return strings.Join(strings.Fields(b.String()), " ")
}
