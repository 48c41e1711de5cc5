// Package logging checks the list of log attributes in docs/logging.md.
package logging

import (
	"fmt"
	"go/ast"
	"go/constant"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/renewd/renewd/test/tree"
)

const (
	root   = "../.."
	list   = "docs/logging.md"
	module = tree.Module
)

// programs are those whose logs operators read. An attribute that none of them has is
// of the demo.
var programs = []string{"agent", "server", "keysetctl"}

var (
	row = regexp.MustCompile("(?m)^\\| `([^`]*)` \\| ([^|]*[^| ]) \\| ([^|]*[^| ]) \\|$")
	key = regexp.MustCompile(`^[a-z][a-z0-9_]*$`)
)

// Every attribute of a log message has one row, with its programs, and every row is an
// attribute.
func TestAttributesAreListed(t *testing.T) {
	t.Parallel()
	used := attributes(t)
	if len(used) == 0 {
		t.Fatal("no attribute found")
	}
	listed := make(map[string]bool)
	last := ""
	for _, m := range row.FindAllStringSubmatch(tree.Read(t, tree.FS(root), list), -1) {
		name, where := m[1], m[3]
		switch use := used[name]; {
		case listed[name]:
			t.Errorf("%s: %s has two rows", list, name)
		case use == nil:
			t.Errorf("%s: no log message has the attribute %s: remove its row", list, name)
		case where != use.programs():
			t.Errorf("%s: %s is of %q, want %q", list, name, where, use.programs())
		}
		if name < last {
			t.Errorf("%s: %s is not in alphabetical order", list, name)
		}
		listed[name], last = true, name
	}
	for _, name := range slices.Sorted(maps.Keys(used)) {
		if use := used[name]; !listed[name] {
			t.Errorf("%s: the attribute %s of %s is missing: add | `%s` | MEANING | %s |", list, name, use.at, name, use.programs())
		}
	}
}

// use is where an attribute is used.
type use struct {
	at token.Position // the first
	by map[string]bool
}

func (u *use) programs() string {
	var out []string
	for _, p := range programs {
		if u.by[p] {
			out = append(out, p)
		}
	}
	if out == nil {
		return "demo"
	}
	return strings.Join(out, ", ")
}

// attributes returns the attributes of all log messages.
func attributes(t *testing.T) map[string]*use {
	t.Helper()
	all := make(map[string]tree.Package)
	for _, p := range tree.Packages(t, root, "-export", "-deps") {
		all[p.ImportPath] = p
	}
	f := finder{t: t, set: token.NewFileSet(), found: make(map[string]*use)}
	imports := importer.ForCompiler(f.set, "gc", func(path string) (io.ReadCloser, error) {
		if p := all[path]; p.Export != "" {
			return os.Open(p.Export)
		}
		return nil, fmt.Errorf("no package %s", path)
	})
	for _, path := range slices.Sorted(maps.Keys(all)) {
		if path != module && !strings.HasPrefix(path, module+"/") {
			continue
		}
		p := all[path]
		f.by = make(map[string]bool)
		for _, name := range programs {
			main := module + "/cmd/" + name
			f.by[name] = path == main || slices.Contains(all[main].Deps, path)
		}
		var files []*ast.File
		for _, name := range p.GoFiles {
			source, err := os.ReadFile(filepath.Join(p.Dir, name))
			if err != nil {
				t.Fatal(err)
			}
			file, err := parser.ParseFile(f.set, strings.TrimPrefix(path, module+"/")+"/"+name, source, 0)
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, file)
		}
		f.info = &types.Info{Types: make(map[ast.Expr]types.TypeAndValue), Uses: make(map[*ast.Ident]types.Object)}
		if _, err := (&types.Config{Importer: imports}).Check(path, f.set, files, f.info); err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			ast.Inspect(file, f.visit)
		}
	}
	return f.found
}

// finder collects attributes of one package after the other.
type finder struct {
	t     *testing.T
	set   *token.FileSet
	info  *types.Info
	by    map[string]bool // the programs with the package
	found map[string]*use
}

// visit finds attributes as arguments of slog's functions and methods, and of other
// functions that take them, and in lists of them.
func (f *finder) visit(n ast.Node) bool {
	switch n := n.(type) {
	case *ast.CallExpr:
		f.call(n)
	case *ast.CompositeLit:
		if isList(f.info.TypeOf(n)) {
			f.pairs(n.Elts, false)
		}
	}
	return true
}

func (f *finder) call(call *ast.CallExpr) {
	if call.Ellipsis.IsValid() {
		return // a list, which is found where it is made
	}
	name := calledName(call)
	if name != nil && name.Name == "append" && f.info.Types[call.Fun].IsBuiltin() {
		if isList(f.info.TypeOf(call)) {
			f.pairs(call.Args[1:], false)
		}
		return
	}
	sig, ok := f.info.TypeOf(call.Fun).(*types.Signature)
	if !ok || name == nil {
		return
	}
	path := module // of a function value, too
	if fun, ok := f.info.Uses[name].(*types.Func); ok && fun.Pkg() != nil {
		path = fun.Pkg().Path()
	}
	isSlog, fixed := path == "log/slog", sig.Params().Len()-1
	switch {
	case isSlog && isAttr(sig):
		f.add(call.Args[0], true)
	case fixed > 0 && sig.Params().At(fixed-1).Name() == "format": // like fmt.Printf
	case sig.Variadic() && isList(sig.Params().At(fixed).Type()) && (isSlog || strings.HasPrefix(path, module)):
		f.pairs(call.Args[fixed:], isSlog)
	}
}

// pairs finds the attributes of a list of keys and values. Without certain the list may
// be one of something else: it counts only if each key can be one.
func (f *finder) pairs(list []ast.Expr, certain bool) {
	var keys []ast.Expr
	for i := 0; i < len(list); i++ {
		if named, ok := f.info.TypeOf(list[i]).(*types.Named); ok && named.String() == "log/slog.Attr" {
			continue
		}
		if value := f.info.Types[list[i]].Value; !certain && (i+1 == len(list) || value == nil || value.Kind() != constant.String || !key.MatchString(constant.StringVal(value))) {
			return
		}
		keys = append(keys, list[i])
		i++
	}
	for _, k := range keys {
		f.add(k, certain)
	}
}

func (f *finder) add(e ast.Expr, certain bool) {
	at := f.set.Position(e.Pos())
	value := f.info.Types[e].Value
	if value == nil || value.Kind() != constant.String || !key.MatchString(constant.StringVal(value)) {
		if certain {
			f.t.Errorf("%s: the key of an attribute is not a constant of lower-case letters, digits and underscores", at)
		}
		return
	}
	name := constant.StringVal(value)
	if f.found[name] == nil {
		f.found[name] = &use{at: at, by: make(map[string]bool)}
	}
	for p, has := range f.by {
		f.found[name].by[p] = f.found[name].by[p] || has
	}
}

// calledName is the name of the function that is called, nil for others.
func calledName(call *ast.CallExpr) *ast.Ident {
	switch fun := ast.Unparen(call.Fun).(type) {
	case *ast.Ident:
		return fun
	case *ast.SelectorExpr:
		return fun.Sel
	}
	return nil
}

// isList reports whether a type is []any.
func isList(t types.Type) bool {
	s, ok := t.(*types.Slice)
	return ok && types.Identical(s.Elem().Underlying(), types.NewInterfaceType(nil, nil))
}

// isAttr reports whether a function is one such as slog.String.
func isAttr(sig *types.Signature) bool {
	return sig.Results().Len() == 1 && sig.Results().At(0).Type().String() == "log/slog.Attr" &&
		sig.Params().Len() > 0 && types.Identical(sig.Params().At(0).Type(), types.Typ[types.String])
}
